"""Distil JUnit reports of the gpu suite into the one small record that the repository keeps.

    python3 tests/gpu/suite_record.py h200.xml a100.xml --out suite.json

The record has the commit, the versions, and per report (named by its file) the counts of passed, failed and skipped
tests, the names of the failed ones, the reasons of the skipped ones with their counts, and the seconds. A run that was
killed leaves no report, and is recorded as ``"complete": false``.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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


def summarize(path: Path) -> dict[str, Any]:
    """One report as counts and names."""
    try:
        tests = list(outcomes(path))
        suites = ET.parse(path).getroot().findall("testsuite")  # noqa: S314
    except (OSError, ET.ParseError):
        return {"complete": False}
    failures = sorted(name for name, outcome, _ in tests if outcome == "failed")
    skipped = Counter(_NUMBER.sub("…", why) for _, outcome, why in tests if outcome == "skipped")
    seconds = sum(float(suite.get("time") or 0.0) for suite in suites)
    return {
        "complete": True,
        "passed": sum(outcome == "passed" for _, outcome, _ in tests),
        "failed": len(failures),
        "skipped": sum(skipped.values()),
        "seconds": round(seconds, 1),
        "failures": failures,
        "skip_reasons": dict(skipped.most_common()),
    }


def record(paths: Sequence[Path]) -> dict[str, Any]:
    """The record of several reports, from this machine and checkout."""
    from moe_dispatch.machine import Machine
    from moe_dispatch.measure.provenance import commit, versions

    machine = Machine.inspect()
    return {
        "machine": machine.name,
        "commit": commit(Path(__file__).parent),
        "versions": versions(machine),
        "runs": {path.stem: summarize(path) for path in paths},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="JUnit XML files of pytest")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    made = record(options.reports)
    options.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, run in made["runs"].items():
        print(name, json.dumps({key: value for key, value in run.items() if key != "skip_reasons"}))


if __name__ == "__main__":
    main()
