"""Distil JUnit reports of the gpu suite into the one small record that the repository keeps.

    python3 tests/gpu/suite_record.py h200.xml a100.xml --out suite.json

The record has the commit, the versions, and per report (named by its file) the counts of passed, failed and skipped
tests, the names of the failed ones, the reasons of the skipped ones with their counts, and the seconds. A run that was
interrupted has them of the tests that ran, and ``"complete": false``; one that was killed leaves no report, and has
nothing else.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

# Numbers of one test, such as a size; without them, the reasons of many tests are one. Names keep their digits.
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")


def outcomes(path: Path) -> Iterator[tuple[str, str, str]]:
    """For each test of a report its name, ``"passed"``, ``"failed"`` or ``"skipped"``, and why it was skipped."""
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - written by pytest a moment ago
        name, skip = f"{case.get('classname')}::{case.get('name')}", case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            yield name, "failed", ""
        elif skip is not None:
            yield name, "skipped", skip.get("message") or "no reason"
        else:
            yield name, "passed", ""


def summarize(path: Path, *, complete: bool) -> dict[str, Any]:
    """One report as counts and names, and whether its run came to its last test, which the report does not say."""
    try:
        tests = list(outcomes(path))
        suites = ET.parse(path).getroot().findall("testsuite")  # noqa: S314
    except (OSError, ET.ParseError):
        return {"complete": False}
    failures = sorted(name for name, outcome, _ in tests if outcome == "failed")
    skipped = Counter(_NUMBER.sub("…", why) for _, outcome, why in tests if outcome == "skipped")
    seconds = sum(float(suite.get("time") or 0.0) for suite in suites)
    return {
        "complete": complete,
        "passed": sum(outcome == "passed" for _, outcome, _ in tests),
        "failed": len(failures),
        "skipped": sum(skipped.values()),
        "seconds": round(seconds, 1),
        "failures": failures,
        "skip_reasons": dict(skipped.most_common()),
    }


def record(paths: Sequence[Path], interrupted: Collection[str] = ()) -> dict[str, Any]:
    """The record of several reports, from this machine and checkout; those of interrupted runs are named."""
    from moe_dispatch.machine import Machine
    from moe_dispatch.measure.provenance import commit, versions

    machine = Machine.inspect()
    return {
        "machine": machine.name,
        "commit": commit(Path(__file__).parent),
        "versions": versions(machine),
        "runs": {path.stem: summarize(path, complete=path.stem not in interrupted) for path in paths},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="JUnit XML files of pytest")
    parser.add_argument(
        "--interrupted", action="append", default=[], metavar="NAME",
        help="a report (by its name without .xml) of a run that ended before its last test",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_intermixed_args(arguments)
    made = record(options.reports, options.interrupted)
    options.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, run in made["runs"].items():
        print(name, json.dumps({key: value for key, value in run.items() if key != "skip_reasons"}))


if __name__ == "__main__":
    main()
