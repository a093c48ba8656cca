"""Which of an engine's expert layers `moe_forward` takes, why it leaves the others, and what is said about it."""

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from moe_dispatch.api import explain
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.integrations.vllm.gates import gate_of
from moe_dispatch.integrations.vllm.storage import FORMS, stored_dtype
from moe_dispatch.machine import Machine
from moe_dispatch.problem import MoEProblem
from moe_dispatch.registry import LAST_RESORT
from moe_dispatch.weight_checks import DTYPE_NAMES


@dataclass
class Takeover:
    """What has been decided for the layers of this process's engine.

    Attributes:
        taken: Description of a layer -> how many are ours.
        left: Reason -> how many layers stay vLLM's.
    """

    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    _told: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, description: str) -> None:
        """Count a layer as ours."""
        with self._lock:
            self.taken[description] += 1

    def leave(self, reasons: list[str]) -> None:
        """Count a layer as vLLM's own. A model of which no layer is ours has no later moment to say so."""
        with self._lock:
            self.left["; ".join(reasons)] += 1
        if not self.taken and self.left.total() == 1:
            self.tell()

    def tell(self) -> None:
        """Log one line on all layers so far, unless nothing has changed since the last one."""
        with self._lock:
            counts = self.taken.total(), self.left.total()
            if counts == self._told:
                return
            self._told = counts
        ours = ", ".join(f"{count} × {what}" for what, count in self.taken.items()) or "no expert layer"
        theirs = ", ".join(f"{count} ({why})" for why, count in self.left.items()) or "none"
        vllm_logger().info("moe_dispatch runs %s; left to vLLM: %s", ours, theirs)


def vllm_logger() -> logging.Logger:
    """A logger below vLLM's, so that its level and format apply: an engine shows nothing of other packages' INFO."""
    return logging.getLogger("vllm.moe_dispatch")


TAKEOVER: Final = Takeover()


def reasons_against(moe_config: Any, vllm_config: Any, method: Any) -> list[str]:
    """Everything that speaks against running a layer through `moe_forward`; empty where nothing does.

    Args:
        moe_config: vLLM's `FusedMoEConfig` of the layer.
        vllm_config: The engine's `VllmConfig`.
        method: The layer's quantisation method, which decides how weights are stored.
    """
    reasons = [*_engine_reasons(vllm_config), *_parallel_reasons(moe_config.moe_parallel_config)]
    if moe_config.is_lora_enabled:
        reasons.append("LoRA adapters need vLLM's own experts")
    if (asked := getattr(moe_config, "moe_backend", "auto")) != "auto":
        reasons.append(f"--moe-backend {asked} names vLLM's own")
    for understand in (gate_of, lambda config: stored_dtype(config, method)):
        try:
            understand(moe_config)
        except InvalidInputError as reason:
            reasons.append(str(reason))
    if not reasons and torch.cuda.is_available():
        reasons += kernel_reasons(_problem(moe_config, method, torch.cuda.get_device_capability()))
    return reasons


def kernel_reasons(problem: MoEProblem, machine: Machine | None = None) -> list[str]:
    """Why a layer would run as the reference's loop over experts, which is slower than vLLM's kernels on any GPU.

    Args:
        problem: A call of the layer.
        machine: See `explain`.
    """
    explanation = explain(problem, machine=machine)
    if explanation.chosen is not None and explanation.chosen.choice.backend != LAST_RESORT:
        return []
    against = (f"{each.choice.backend} {', '.join(each.against)}" for each in explanation.candidates if each.against)
    return [f"no backend but {LAST_RESORT} runs it on this GPU ({'; '.join(against)})"]


def describe(moe_config: Any, method: Any) -> str:
    """A layer as the log line names it."""
    activation, _ = gate_of(moe_config)
    words = (
        f"E={moe_config.num_local_experts} topk={moe_config.experts_per_token} K={moe_config.hidden_dim} "
        f"N={moe_config.intermediate_size_per_partition} {FORMS[stored_dtype(moe_config, method)]}"
    )
    return words if activation == "silu" else f"{words} {activation}"


def _problem(moe_config: Any, method: Any, capability: tuple[int, int]) -> MoEProblem:
    """The call with one token of a layer that is understood."""
    activation, interleaved = gate_of(moe_config)
    return MoEProblem(
        M=1, K=moe_config.hidden_dim, N=moe_config.intermediate_size_per_partition, E=moe_config.num_local_experts,
        topk=moe_config.experts_per_token, dtype=stored_dtype(moe_config, method),
        act_dtype=DTYPE_NAMES[moe_config.in_dtype], activation=activation, bias=getattr(moe_config, "has_bias", False),
        interleaved=interleaved, capability=capability,
    )  # fmt: skip


def _engine_reasons(vllm_config: Any) -> list[str]:
    from vllm import envs

    reasons = []
    if envs.VLLM_BATCH_INVARIANT:
        reasons.append("VLLM_BATCH_INVARIANT needs results that do not depend on the batch")
    parallel = vllm_config.parallel_config
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        reasons.append("dual-batch overlap runs layers on two threads")
    offload = getattr(vllm_config, "offload_config", None)
    uva = getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    prefetch = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    if uva or prefetch or getattr(vllm_config.cache_config, "cpu_offload_gb", 0):
        reasons.append("weights offloaded to host memory")
    return reasons


def _parallel_reasons(parallel: Any) -> list[str]:
    reasons = []
    if parallel.use_ep:
        reasons.append(f"expert parallelism (ep_size={parallel.ep_size})")
    if parallel.dp_size > 1:
        reasons.append(f"data parallelism (dp_size={parallel.dp_size})")
    if parallel.pcp_size > 1:
        reasons.append(f"prefill context parallelism (pcp_size={parallel.pcp_size})")
    if parallel.enable_eplb:
        reasons.append("expert-parallel load balancing moves experts while serving")
    return reasons
