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


BLOCK = "with cleaned_up_on_sigterm(lambda: say('clean ')):\n    "
OWN = "signal.signal(signal.SIGTERM, lambda *_: say('own '))\n"
THREAD = """
inside, leave = threading.Event(), threading.Event()
def work():
    with cleaned_up_on_sigterm(lambda: say('thread ')):
        inside.set(); leave.wait(60)
threading.Thread(target=work, daemon=True).start()
inside.wait(60)
"""
CHILD = """
    child = os.fork()
    if not child: terminate()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
say(str(status))
"""
# A program, its status, and what it says.
PROGRAMS = {
    "the clean-up runs and the process ends": (f"{BLOCK}terminate()\n    say('alive')", -signal.SIGTERM, "clean "),
    "after the block the default action is back": (f"{BLOCK}pass\nterminate()\nsay('alive')", -signal.SIGTERM, ""),
    "a handler from before stays in place": (f"{OWN}{BLOCK}terminate()\nsay('alive')", 0, "own alive"),
    "a handler from inside stays in place": (f"{BLOCK}{OWN}terminate()\nsay('alive')", 0, "own alive"),
    "nested blocks are all cleaned up from the inside out": (
        f"{BLOCK}with cleaned_up_on_sigterm(lambda: say('done ')): pass\n"
        "    with cleaned_up_on_sigterm(lambda: say('inner ')): terminate()",
        -signal.SIGTERM,
        "inner clean ",
    ),
    "a clean-up that raises stops no other": (
        f"{BLOCK}with cleaned_up_on_sigterm(lambda: 1 / 0): terminate()",
        -signal.SIGTERM,
        "clean ",
    ),
    "a block in another thread is cleaned up too": (f"{THREAD}{BLOCK}terminate()", -signal.SIGTERM, "clean thread "),
    "a forked child does not clean up after its parent": (f"{BLOCK}{CHILD}", 0, str(-signal.SIGTERM)),
}


@pytest.mark.parametrize(("body", "status", "says"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program(body: str, status: int, says: str) -> None:
    done = subprocess.run([sys.executable, "-c", PREAMBLE + body], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (status, says)
