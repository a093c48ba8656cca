"""Making the integration known to transformers."""

from typing import Final

from moe_dispatch.system.libraries import library_status

NAME: Final = "moe_dispatch"


def register() -> None:
    """Make ``experts_implementation="moe_dispatch"`` known to transformers, for plain and for FP8 models.

    Raises:
        ImportError: transformers is missing or older than 5.17.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        remedy = library_status("transformers", "", "").remedy
        raise ImportError(f"the transformers integration needs transformers 5.17 or newer: {remedy}") from error
    from moe_dispatch.integrations.transformers.forward import experts_forward

    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)
