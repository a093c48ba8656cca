# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""A hand-over through shared memory that is correct, or a race on request: the control for racecheck's reports.

    compute-sanitizer --tool racecheck python tests/gpu/racecheck_control.py [--early written|read]

One warp hands numbers to four warps through a slot in shared memory, guarded by two mbarriers, "written" and "read", at
which threads arrive as in the kernels for Hopper. With `--early` a thread arrives at one of them before its access: a
race, which racecheck must report. Without it racecheck must report nothing.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_dispatch.backends.gluon_hopper.common import arrive

NUMBERS = 64  # handed over by each program
PROGRAMS = 128
RUNS = 8  # whether a race shows in a run depends on which warp comes first


@gluon.jit
def _control_kernel(out_ptr, numbers, EARLY: gl.constexpr):
    """Writes 1, 2, …, `numbers` for each program: out ``[programs, numbers]``, int32."""
    slot = gl.allocate_shared_memory(gl.int32, [1, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(written.index(0), count=1 + 32)
    mbarrier.init(read.index(0), count=1 + 128)
    out_ptr += gl.program_id(0) * numbers
    gl.warp_specialize(
        [
            (_take, (slot, written, read, out_ptr, numbers, EARLY)),
            (_give, (slot, written, read, numbers, EARLY)),
        ],
        [1],
        [40],
    )


@gluon.jit
def _give(slot, written, read, numbers, EARLY: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(numbers):
        mbarrier.wait(read.index(0), i & 1 ^ 1)
        if EARLY == "written":
            arrive(written.index(0))
        slot.index(0).store(gl.full([1], i + 1, gl.int32, ONE))
        if EARLY != "written":
            arrive(written.index(0))


@gluon.jit
def _take(slot, written, read, out_ptr, numbers, EARLY: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(numbers):
        mbarrier.wait(written.index(0), i & 1)
        if EARLY == "read":
            arrive(read.index(0))
        number = gl.max(slot.index(0).load(ONE), 0)
        if EARLY != "read":
            arrive(read.index(0))
        gl.store(out_ptr + i, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the hand-over; the exit status is 1 if numbers are wrong although no arrival was early."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--early", choices=("written", "read"), help="arrive at this barrier before the access that it announces"
    )
    early = parser.parse_args(arguments).early
    expected = torch.arange(1, NUMBERS + 1, dtype=torch.int32).expand(PROGRAMS, -1)
    wrong = 0
    for _ in range(RUNS):
        out = torch.zeros(PROGRAMS, NUMBERS, dtype=torch.int32).cuda()
        _control_kernel[(PROGRAMS,)](out, NUMBERS, EARLY=early, num_warps=4)
        wrong += not torch.equal(out.cpu(), expected)
    print(f"{wrong} of {RUNS} runs wrong")
    return 1 if wrong and not early else 0


if __name__ == "__main__":
    sys.exit(main())
