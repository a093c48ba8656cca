"""Whether racecheck reports of our kernels only what it reports of a kernel that is right: 1 if there is more.

    python benchmarks/racecheck_kinds.py racecheck.log racecheck-control.log

A hazard is two accesses, each with the line of source it came from. Its kind is what these lines do.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ACCESS = re.compile(r"(?P<access>Read|Write) access at \S+(?: in (?P<file>[^:\s]+):(?P<line>\d+))?")
_SUMMARY = "RACECHECK SUMMARY"
# In this order: the first that matches says what a line does.
_STATEMENTS = (
    # Triton reads and writes there which partition a warp runs; the line is the kernel's or the call's.
    (re.compile(r"gl\.warp_specialize\(|@gluon\.jit|def \w+_kernel\("), "warp specialisation"),
    (re.compile(r"\.index\(.*\)\.(store|load)\("), "a slot that mbarriers guard"),
)

Kind = tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="of our kernels")
    parser.add_argument("control", type=Path, help="of benchmarks/racecheck_control.py")
    parser.add_argument("--sources", type=Path, default=ROOT, help="the tree that was run")
    given = parser.parse_args(arguments)
    ours, control = (Counter(kinds(path.read_text(), given.sources)) for path in (given.log, given.control))
    for kind, count in sorted(ours.items()):
        print(f"{'the tool' if kind in control else 'OURS'}: {count} × {' and '.join(kind)}")
    print(f"{sum(ours.values())} pairs of accesses reported; of the control {sum(control.values())}")
    return 1 if set(ours) - set(control) else 0


def kinds(log: str, sources: Path) -> Iterator[Kind]:
    """The kind of each reported pair of accesses, in the log's order.

    Raises:
        ValueError: The log is not a whole one of racecheck.
    """
    if _SUMMARY not in log:
        raise ValueError("the log has no summary: racecheck did not reach its end")
    first = ""
    for line in log.splitlines():
        if found := _ACCESS.search(line):
            access = f"{found['access'].lower()} of {_statement(found['file'], found['line'], sources)}"
            if "Race reported" in line:
                first = access
            else:
                yield tuple(sorted((first, access)))


def _statement(name: str | None, line: str | None, sources: Path) -> str:
    if name is None or line is None:
        return "an unknown line"
    files = [path for folder in ("backends", "benchmarks") for path in sorted((sources / folder).rglob(name))]
    texts = {path.read_text().splitlines()[int(line) - 1].strip() for path in files}
    if len(texts) != 1:
        return f"{name}:{line}"
    (text,) = texts
    return next((does for pattern, does in _STATEMENTS if pattern.search(text)), f"{name}:{line}")


if __name__ == "__main__":
    sys.exit(main())
