"""What `moe-dispatch explain` promises for the machines that ship compiles for their capability."""

from collections.abc import Iterator
from functools import partial

import pytest

from moe_dispatch.dispatch.dispatcher import Dispatcher
from moe_dispatch.machine import Machine, shipped_machines
from moe_dispatch.problem import DType
from moe_dispatch.registry import BACKENDS
from moe_dispatch.system.libraries import library_version
from moe_dispatch.workloads import WORKLOADS
from tests.support.triton_compile import Launch, compile_launches, unwritten_layer

OURS = ("triton_splitk", "triton_vector", "triton_persistent", "gluon_hopper")
TOKENS = tuple(1 << power for power in range(15))
MACHINES = [(name, Machine.load(name)) for name in shipped_machines()]
# An AMD device gets a reason from every backend of ours.
CAPABILITIES = sorted(
    {
        10 * machine.capability[0] + machine.capability[1]
        for _, machine in MACHINES
        if machine.cuda and machine.capability
    }
)
DTYPES: tuple[DType, ...] = ("bf16", "fp8")


def launch_promises(capability: int, dtype: DType) -> Iterator[Launch]:
    """The first choice for every named model, token count and mode on the machines of a capability, each once."""
    seen = set()
    for name, described in MACHINES:
        if described.capability != divmod(capability, 10):
            continue
        machine = described.model_copy(update={"triton": library_version("triton")})
        planner = Dispatcher(machine, live=False).planner
        problems = (
            layer.problem(M, dtype, machine, mode)
            for layer in WORKLOADS.values()
            for M in TOKENS
            for mode in ("eager", "graph")
        )
        for problem in problems:
            chosen = planner.explain(problem).chosen
            if chosen is None or chosen.choice.backend not in OURS:
                continue
            backend = BACKENDS.load(chosen.choice.backend)(machine)
            choice = chosen.choice.config
            config = (
                backend.default_config(problem) if choice is None else backend.config_type.model_validate(dict(choice))
            )
            key = (backend.name, config, problem.activation, problem.K, problem.N, problem.interleaved, problem.bias)
            if key not in seen:
                seen.add(key)
                yield Launch(partial(backend.run, *unwritten_layer(problem), config), {"machine": name})


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def test_the_first_choice_compiles_and_fits(capability: int, dtype: DType) -> None:
    kernels = compile_launches(launch_promises, capability, dtype=dtype)
    assert {built.name for built in kernels} >= {
        "_moe_splitk_gate_up_kernel",
        "_moe_product_kernel",
    } or capability == 90
    limits = {name: machine.shared_memory_per_block for name, machine in MACHINES}
    for built in kernels:
        assert built.shared <= limits[built.note["machine"]], built
