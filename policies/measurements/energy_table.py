"""Ranks the backends of a layer by measured energy, and by time where no energy was measured."""

from collections.abc import Iterator

from moe_dispatch.policies.measurements.table import NOISE, LayerTable, lead
from moe_dispatch.policy import Choice


class EnergyTable:
    """The measurements of one layer in one mode, ranked by energy.

    Args:
        times: Its times in µs.
        joules: Its energies of a call in joules, of the candidates that have one.
    """

    def __init__(self, times: LayerTable, joules: LayerTable) -> None:
        self._times, self._joules = times, joules

    def choices(self, M: int, mode: str) -> Iterator[Choice]:
        """The candidates with energies, the least first, then other backends as their times rank them.

        Energies decide only where all measured token counts that decide about M have them: a candidate may be wrong at
        a token count that an energy is extrapolated over.

        Args:
            M: Tokens.
            mode: The part of a reason that names the mode.
        """
        ranked = self._joules.rank(M) if self._joules.around(M) == self._times.around(M) else ()
        times = [self._times.us(identity, M) for identity, _ in ranked]
        for place, (((backend, config), joules), us) in enumerate(zip(ranked, times, strict=True)):
            rival = times[0] if place else times[1] if len(times) > 1 else None
            reason = f"{1e3 * joules / M:.3g} mJ a token and {us:.1f} µs {self._times.where(M, mode)}"
            yield Choice(backend, reason + lead(ranked, place, "least") + _pace(us, rival), dict(config), us)
        measured = {backend for (backend, _), _ in ranked}
        yield from (choice for choice in self._times.choices(M, mode) if choice.backend not in measured)


def _pace(us: float, rival: float | None) -> str:
    """How much slower or faster a candidate is than the one whose energy its own is compared with."""
    if rival is None:
        return ""
    slower = us / rival - 1
    if abs(slower) <= NOISE:
        return ", as fast"
    return f", {abs(slower):.0%} {'slower' if slower > 0 else 'faster'}".replace("%", " %")
