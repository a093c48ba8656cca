"""Measured tables that ship with the package, for machines that were not calibrated."""

import dataclasses
from collections.abc import Iterator

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import MeasuredPolicy
from moe_dispatch.policies.measurements.schema import CalibrationFile, parse_calibration
from moe_dispatch.policies.measurements.table import rough_us
from moe_dispatch.policies.measurements.versions import changes
from moe_dispatch.policies.nearest import TABLE, Nearest, nearest, read_shipped
from moe_dispatch.policy import Choice
from moe_dispatch.problem import MoEProblem


class ShippedPolicy(MeasuredPolicy):
    """Ranks by the table that ships for devices of this name, in ``policies/tables/<device>.json.xz``.

    A device of the same capability without a table uses the nearest one. Its times are then estimates: those of the
    table, times the ratio of the two devices' rooflines.

    Other versions of driver or library do not retire a shipped table, because a choice measured with another version is
    still better than one that was not measured. `notes` says with which versions the table was measured.
    """

    name = "shipped"
    retires = False

    def ranked(self, problem: MoEProblem) -> Iterator[Choice]:
        """See `Policy.ranked`."""
        choices = super().ranked(problem)
        if self._neighbour is None or problem.M < 1:  # no tokens take no time, and are not ranked
            return choices
        slowdown = self._neighbour.slowdown(problem)
        return (_estimated(choice, slowdown, self._neighbour) for choice in choices)

    def _read(self) -> Iterator[CalibrationFile]:
        source = nearest(self.machine, TABLE)
        # The other device whose table serves this one; None where it is this device's own.
        self._neighbour = source if source and source.slug != self.machine.slug else None
        if source is None:
            return
        try:
            yield self._table_of(source)
        except PolicyFileError as error:
            self._refuse(error)

    def _table_of(self, source: Nearest) -> CalibrationFile:
        """The table of a device, checked.

        Raises:
            PolicyFileError: It is missing, damaged, or of another device than its name says.
        """
        content, path = read_shipped(source.slug, TABLE)
        file = parse_calibration(content, path)
        if source.slug != self.machine.slug:
            self._notes.append(source.note("table"))
        else:
            _require_same_device(file.machine, self.machine, path)
        if changed := changes(_versions(file.machine), _versions(self.machine)):
            self._notes.append(
                f"the table was measured with other versions ({', '.join(changed)}): `moe-dispatch calibrate` measures "
                "with those of today"
            )
        return file


def _require_same_device(there: Machine, here: Machine, origin: str) -> None:
    if (there.name, there.capability, there.sms) != (here.name, here.capability, here.sms):
        raise PolicyFileError(
            f"{origin} was measured on {there.name!r} with {there.sms} multiprocessors and capability "
            f"{there.capability}, and this is {here.name!r} with {here.sms} and {here.capability}; calibrate here"
        )


def _versions(machine: Machine) -> dict[str, str]:
    """Versions by name, without those of libraries that are missing: they are reasons of their backends."""
    return {"torch": machine.torch, "triton": machine.triton, "driver": machine.driver, **machine.libraries}


def _estimated(choice: Choice, slowdown: float, source: Nearest) -> Choice:
    us = None if choice.us is None else choice.us * slowdown
    about = "" if us is None else f"about {rough_us(us)} µs here: "
    return dataclasses.replace(choice, us=us, reason=f"{about}{choice.reason} on {source.name}")
