# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""A kernel that is right by inspection, for racecheck to judge beside ours: what it reports here is the tool's own.

    compute-sanitizer --tool racecheck python benchmarks/racecheck_control.py

One warp hands numbers to four through a slot in shared memory, in the way of the kernels for Hopper: two mbarriers, one
for "written" and one for "read". Racecheck follows an mbarrier from the thread that arrives to those that wait. Gluon's
arrival is that of one thread, after a barrier of its partition; that what the other threads wrote or read came before
it, racecheck does not see. Nor does it follow the barriers by which Triton starts and ends the partitions.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

NUMBERS = 64  # handed over by each program
PROGRAMS = 128
RUNS = 8  # not every run is reported: it is a matter of which warp comes first


@gluon.jit
def _control_kernel(out_ptr, numbers):
    """Writes 1, 2, …, `numbers` for each program: out ``[programs, numbers]``, int32."""
    slot = gl.allocate_shared_memory(gl.int32, [1, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(written.index(0), count=1)
    mbarrier.init(read.index(0), count=1)
    out_ptr += gl.program_id(0) * numbers
    gl.warp_specialize(
        [(_take, (slot, written, read, out_ptr, numbers)), (_give, (slot, written, read, numbers))], [1], [40]
    )


@gluon.jit
def _give(slot, written, read, numbers):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(numbers):
        mbarrier.wait(read.index(0), i & 1 ^ 1)
        slot.index(0).store(gl.full([1], i + 1, gl.int32, ONE))
        mbarrier.arrive(written.index(0))


@gluon.jit
def _take(slot, written, read, out_ptr, numbers):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(numbers):
        mbarrier.wait(written.index(0), i & 1)
        number = gl.max(slot.index(0).load(ONE), 0)
        mbarrier.arrive(read.index(0))
        gl.store(out_ptr + i, number)


def main() -> int:
    """Run it; 1 if a number is not what was handed over."""
    expected = torch.arange(1, NUMBERS + 1, dtype=torch.int32).expand(PROGRAMS, -1)
    for _ in range(RUNS):
        out = torch.zeros(PROGRAMS, NUMBERS, dtype=torch.int32).cuda()
        _control_kernel[(PROGRAMS,)](out, NUMBERS, num_warps=4)
        if not torch.equal(out.cpu(), expected):
            print("WRONG: a number is not what was handed over")
            return 1
    print(f"ok {RUNS} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
