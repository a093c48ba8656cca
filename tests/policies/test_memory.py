"""The memory that a calibration asks for before it allocates."""

from pathlib import Path

import pytest
import torch

from moe_dispatch.machine import Machine
from moe_dispatch.measure import make_inputs
from moe_dispatch.policies.calibration import memory
from moe_dispatch.policies.calibration.memory import free_bytes, input_bytes, require, weight_bytes
from moe_dispatch.problem import DType
from moe_dispatch.workloads import ROUTINGS, make_experts, workload

CPU = Machine.inspect("cpu")


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_the_estimate_covers_the_weights_and_is_no_wild_guess(dtype: DType) -> None:
    problem = workload("16,2,256,256").problem(1, dtype, CPU)
    experts = make_experts(problem, dtype, "cpu")
    held = experts.gate_up.nbytes + experts.down.nbytes
    # Beside FP8 codes lie the BF16 values that they are made from.
    assert held < weight_bytes(problem) < (5 if dtype == "fp8" else 2) * held


def test_the_estimate_covers_the_inputs() -> None:
    problem = workload("16,2,256,256").problem(500, "bf16", CPU)
    inputs = make_inputs(problem, ROUTINGS["uniform"], "cpu", 3)
    held = sum(one.hidden_states.nbytes + one.topk_ids.nbytes + one.topk_weights.nbytes for one in inputs)
    assert held < input_bytes(problem, 3) < 3 * held


def test_what_is_not_free_is_refused_with_both_sizes() -> None:
    free = free_bytes(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say what is free")
    require(free // 2, "the weights", torch.device("cpu"))
    with pytest.raises(MemoryError, match=r"the weights need \d+\.\d GiB, and \d+\.\d GiB are free"):
        require(2 * free + (1 << 30), "the weights", torch.device("cpu"))


def test_the_limit_of_a_control_group_counts_without_its_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"memory.max": "1000000", "memory.current": "600000", "memory.stat": "anon 1\ninactive_file 500000\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 900000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    free = free_bytes(torch.device("cpu"))
    assert free is None or free != 900000
