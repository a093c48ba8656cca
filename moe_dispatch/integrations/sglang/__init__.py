"""`moe_forward` inside SGLang: a plugin that gives an engine's expert layers to `moe_forward`, chosen for each batch.

    pip install '.[sglang]'  # in a checkout
    MOE_DISPATCH_SGLANG=1 python -m sglang.launch_server --model-path Qwen/Qwen3-30B-A3B --moe-runner-backend triton

SGLang loads the entry point ``sglang.srt.plugins: moe_dispatch`` in every process. Without ``MOE_DISPATCH_SGLANG=1`` it
does nothing. With it, calls of SGLang's Triton runner that `runner.reasons_against` has nothing against run through
`moe_forward`; every other layer stays SGLang's own, and one log line says which and why.
"""

import importlib.metadata
import logging
from typing import Final

from moe_dispatch.settings import Settings

VARIABLE: Final = "MOE_DISPATCH_SGLANG"
# Those whose runner was read and is tested. Up to 0.5.16 SGLang does not publish the token counts that it has resolved
# (`get_exec` and `get_schedule` of its `runtime_context`); plugins are loaded from 0.5.11 on.
VERSIONS: Final = tuple(f"0.5.{patch}" for patch in range(17, 24))

logger = logging.getLogger("moe_dispatch")


def register() -> None:
    """Put a hook around SGLang's MoE runner, if ``MOE_DISPATCH_SGLANG`` says so. Never raises: an engine must start."""
    try:
        if not Settings.from_environment().sglang:
            return
        version = importlib.metadata.version("sglang")
        if version not in VERSIONS:
            logger.warning(
                "%s is set, but the MoE runner of SGLang %s is not known; the engine runs its own layers. "
                "Known: %s to %s.",
                VARIABLE,
                version,
                VERSIONS[0],
                VERSIONS[-1],
            )
            return
        from moe_dispatch.integrations.sglang.runner import hook

        hook()
    except Exception as error:  # noqa: BLE001 - SGLang's modules differ by version, and the engine serves without us
        logger.warning("%s is set, but SGLang's expert layers cannot be taken over: %r", VARIABLE, error)
