"""`moe_forward` inside vLLM: a plugin that gives an engine's expert layers to `moe_forward`, chosen for each batch.

    pip install '.[vllm]'  # in a checkout
    MOE_DISPATCH_VLLM=1 vllm serve Qwen/Qwen3-30B-A3B

vLLM loads the entry point ``vllm.general_plugins: moe_dispatch`` in every process. Without ``MOE_DISPATCH_VLLM=1`` it
does nothing. With it, the BF16, FP16 and FP8 expert layers that `takeover.reasons_against` has nothing against
run through `moe_forward`; every other layer stays vLLM's own, and one log line says which and why.

Everything that a served batch may need is compiled and proven while the engine profiles its memory, before the KV cache
is sized: see `engine_warm_up`.
"""

import logging
from typing import Final

from moe_dispatch.settings import Settings

VARIABLE: Final = "MOE_DISPATCH_VLLM"

logger = logging.getLogger("moe_dispatch")


def register() -> None:
    """Replace vLLM's expert layers, if ``MOE_DISPATCH_VLLM`` says so. May be called any number of times.

    Never raises: an engine must start whether or not this plugin can serve it.
    """
    try:
        if not Settings.from_environment().vllm:
            return
        from moe_dispatch.integrations.vllm.layers import replace_layers
        from moe_dispatch.integrations.vllm.takeover import TAKEOVER

        # A model whose layers are of another kind is never asked about, and this is all that the log says then.
        TAKEOVER.logger.info("moe_dispatch is on; a line for each model says which %s it runs", replace_layers())
    except Exception as error:  # noqa: BLE001 - vLLM's modules differ by version, and the engine serves without us
        logger.warning(
            "%s is set, but this vLLM's expert layers cannot be replaced (%s: %s); the engine runs its own. "
            "Supported: vLLM 0.20.2 to 0.33.",
            VARIABLE,
            type(error).__name__,
            error,
        )
