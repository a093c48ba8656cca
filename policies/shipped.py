"""Measured tables of known devices, for machines that were not calibrated."""

from importlib import resources

from moe_dispatch.errors import PolicyFileError
from moe_dispatch.policies.calibrated import MeasuredPolicy
from moe_dispatch.policies.measurements.schema import MAX_FILE_BYTES, CalibrationFile, parse_calibration


class ShippedPolicy(MeasuredPolicy):
    """Ranks by the table that ships for devices of this name, in ``policies/tables/<device>.json``.

    Other versions of driver or library do not retire a shipped table: measured with another version is still better
    than not measured. `notes` says with which.
    """

    name = "shipped"
    retires = False

    def _read(self) -> CalibrationFile | None:
        table = resources.files("moe_dispatch.policies") / "tables" / f"{self.machine.slug}.json"
        try:
            content = table.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise PolicyFileError(f"{table} cannot be read: {error.strerror}; install the package again") from error
        if len(content) > MAX_FILE_BYTES:
            raise PolicyFileError(f"{table} has more than {MAX_FILE_BYTES:,} bytes; install the package again")
        file = parse_calibration(content, str(table))
        there, here = file.machine, self.machine
        if (there.name, there.capability, there.sms) != (here.name, here.capability, here.sms):
            raise PolicyFileError(
                f"{table} was measured on {there.name!r} with {there.sms} multiprocessors and capability "
                f"{there.capability}, and this is {here.name!r} with {here.sms} and {here.capability}; calibrate here"
            )
        if (there.torch, there.driver) != (here.torch, here.driver):
            self._notes.append(
                f"the table was measured with torch {there.torch}, driver {there.driver}; here torch {here.torch}, "
                f"driver {here.driver}: `moe-dispatch calibrate` measures anew"
            )
        return file
