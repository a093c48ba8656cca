"""What several launchers compute for a launch. Imports no Triton."""


def pdl_option(pdl: bool) -> dict[str, bool]:
    """The launch option for programmatic dependent launch.

    Absent rather than False where it is off: Triton for other vendors does not know the option.
    """
    return {"launch_pdl": True} if pdl else {}


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`; 1 for values below 1."""
    return 1 << max(value - 1, 0).bit_length()
