"""Layers and models of transformers in two processes: FSDP2, expert parallelism, and transformers' own plans."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

pytest.importorskip("transformers", minversion="5.17")

from moe_dispatch.integrations.transformers import register, report
from moe_dispatch.integrations.transformers.takeover import take_over
from tests.integrations.transformers_models import build, call_of, calls, eager, experts_of, gpt_oss, layer, qwen3

WORLD = 2
TOKENS = torch.arange(1, 12)[None]


class Block(nn.Module):
    """What FSDP wraps: a block with a layer of experts."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *call: Tensor) -> Tensor:
        out: Tensor = self.experts(*call)
        return out


def check_fsdp(mesh: Any, config: Any) -> None:
    """FSDP refills the memory of its parameters without raising their version."""
    from torch.distributed.fsdp import fully_shard

    block: Any = Block(layer(config))
    call = call_of(block.experts)
    fully_shard(block, mesh=mesh, reshard_after_forward=True)
    with torch.no_grad():
        for _ in range(2):
            before = calls()
            out = block(*call)
            assert calls() > before
            torch.testing.assert_close(out, eager(block, call), rtol=1e-4, atol=1e-4)
            block.reshard()
            for weight in block.parameters():
                weight.to_local().mul_(1.5)


def check_first_fsdp(config: Any, *, use_orig_params: bool) -> None:
    """FSDP's first version puts views of its flat parameter, as plain tensors, in the layer's place for a call."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = build(config)
    expected = model(TOKENS).logits
    expected.square().mean().backward()
    gradient = experts_of(model).down_proj.grad.clone()
    model.zero_grad()
    model.set_experts_implementation("moe_dispatch")
    layers, experts = len(model.model.layers), experts_of(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}), use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    assert {line.state for line in report(wrapped).layers} == {"dispatched"}
    for _ in range(2):
        before = calls()
        with torch.no_grad():
            torch.testing.assert_close(wrapped(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        assert calls() == before + layers
    wrapped(TOKENS).logits.square().mean().backward()
    assert calls() == before + 2 * layers
    if use_orig_params:
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            torch.testing.assert_close(experts.down_proj.grad, gradient, rtol=1e-4, atol=1e-6)


def check_expert_parallel(mesh: Any, config: Any) -> None:
    """Each rank has its part of the experts, and its ids are local; those of other ranks are E. Nothing is copied."""
    from torch.distributed.tensor import Shard

    try:
        from transformers.distributed.expert_parallel import MoEParamShard
        from transformers.distributed.parallel_utils import _use_local_dtensor_params
    except ImportError:  # before 5.18
        from transformers.distributed.tensor_parallel import MoEParamShard, _use_local_dtensor_params

    module = layer(config)
    rows, ids, weights = call_of(module)
    with torch.no_grad():
        expected = eager(module, (rows, ids, weights))
    style = MoEParamShard(Shard(0), shards_expert_dim=True)
    E = module.num_experts
    for name in list(module._parameters):
        module.num_experts = E
        style.shard_param(module, name, mesh)
    local = E // WORLD
    other = ids // local != dist.get_rank()
    for _ in range(2):
        before = calls()
        with torch.no_grad(), _use_local_dtensor_params(module):
            out = module(rows, torch.where(other, local, ids % local), weights.masked_fill(other, 0.0))
        assert calls() > before
        with _use_local_dtensor_params(module):
            experts = take_over(module, torch.float32).experts
            assert experts is not None
            assert experts.gate_up.data_ptr() == module.gate_up_proj.data_ptr()
        dist.all_reduce(out)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def check_plan(mesh: Any, config: Any, *, experts: bool) -> None:
    """A whole model, sharded by transformers' own plan for tensor or expert parallelism."""
    from transformers.distributed import DistributedConfig

    try:
        from transformers.distributed.utils import initialize_distributed_mesh

        own = {"ep_size": WORLD, "ep_implementation": "all_reduce"} if experts else {}
        plan = DistributedConfig(tp_size=WORLD, **own)
        _, mesh = initialize_distributed_mesh(plan)
    except ImportError:  # before 5.18
        plan = DistributedConfig(tp_size=WORLD, enable_expert_parallel=experts)
    model = build(config)
    with torch.no_grad():
        expected = model(TOKENS).logits
    model.set_experts_implementation("moe_dispatch")
    model.maybe_distribute_model(model, plan, mesh)
    assert {line.state for line in report(model).layers} == {"dispatched"}
    whole, divided = experts_of(model).gate_up_proj, 0 if experts else 1
    assert whole.shape[divided] == WORLD * whole.to_local().shape[divided]
    for _ in range(2):
        before = calls()
        with torch.no_grad():
            logits = model(TOKENS).logits
        assert calls() == before + model.config.num_hidden_layers
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)  # before anything else: OpenMP's threads do not survive a fork
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        register()
        mesh = init_device_mesh("cpu", (WORLD,))
        for check in (check_fsdp, check_expert_parallel):
            for config in (qwen3, gpt_oss):  # the second one's experts are stored transposed
                check(mesh, config())
                check_plan(mesh, config(), experts=True)
        for use_orig_params in (True, False):
            check_first_fsdp(qwen3(), use_orig_params=use_orig_params)
        check_plan(mesh, qwen3(), experts=False)  # gpt-oss's plan shards no experts
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_two_processes_agree_with_the_layers_own_forward(tmp_path: Path) -> None:
    used = torch.cuda.is_initialized()
    method = "spawn" if used else "fork"  # a fork has transformers imported
    start_processes(run_rank, (str(tmp_path / "store"),), WORLD, start_method=method)
