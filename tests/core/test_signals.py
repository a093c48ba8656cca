"""SIGTERM inside blocks that leave something to clean up, in real processes."""

import signal
import subprocess
import sys

import pytest

PREAMBLE = """
import os, signal, sys, threading
from moe_dispatch.system.signals import cleaned_up_on_sigterm
def say(text):
    os.write(1, text.encode())
def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
"""


def run(body: str) -> tuple[int, str]:
    """Exit status and output of a program."""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + body], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_the_clean_up_runs_and_the_process_ends() -> None:
    body = "with cleaned_up_on_sigterm(lambda: say('clean')):\n    terminate()\n    say('alive')\n"
    assert run(body) == (-signal.SIGTERM, "clean")


def test_after_the_block_the_default_action_is_back() -> None:
    body = "with cleaned_up_on_sigterm(lambda: say('clean')):\n    pass\nterminate()\nsay('alive')\n"
    assert run(body) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_handler_of_the_program_stays_in_place(when: str) -> None:
    install = "signal.signal(signal.SIGTERM, lambda *_: say('own '))\n"
    body = (
        (install if when == "before" else "")
        + "with cleaned_up_on_sigterm(lambda: say('clean')):\n    "
        + (install if when == "inside" else "pass\n")
        + "terminate()\nsay('alive')\n"
    )
    assert run(body) == (0, "own alive")


def test_nested_blocks_are_all_cleaned_up_from_the_inside_out() -> None:
    body = (
        "with cleaned_up_on_sigterm(lambda: say('outer')):\n"
        "    with cleaned_up_on_sigterm(lambda: say('done ')):\n        pass\n"
        "    with cleaned_up_on_sigterm(lambda: say('inner ')):\n        terminate()\n"
    )
    assert run(body) == (-signal.SIGTERM, "inner outer")


def test_a_clean_up_that_raises_stops_no_other() -> None:
    body = (
        "with cleaned_up_on_sigterm(lambda: say('outer')):\n"
        "    with cleaned_up_on_sigterm(lambda: 1 / 0):\n        terminate()\n"
    )
    assert run(body) == (-signal.SIGTERM, "outer")


def test_a_block_in_another_thread_is_cleaned_up_too() -> None:
    body = (
        "inside, leave = threading.Event(), threading.Event()\n"
        "def work():\n"
        "    with cleaned_up_on_sigterm(lambda: say('thread ')):\n        inside.set(); leave.wait(60)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "inside.wait(60)\n"
        "with cleaned_up_on_sigterm(lambda: say('main ')):\n    terminate()\n"
    )
    assert run(body) == (-signal.SIGTERM, "main thread ")


def test_a_forked_child_does_not_clean_up_after_its_parent() -> None:
    body = (
        "with cleaned_up_on_sigterm(lambda: say('parent ')):\n"
        "    child = os.fork()\n"
        "    if not child:\n        terminate()\n"
        "    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "say(str(status))\n"
    )
    assert run(body) == (0, str(-signal.SIGTERM))
