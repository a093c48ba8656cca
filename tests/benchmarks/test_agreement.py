"""Whether calibrations of one machine agree, on a simulated one: what is decided here is decided by the same code."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_dispatch.benchmarks.record import agreement
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibration import calibrate as module
from moe_dispatch.policies.calibration import run as campaign
from moe_dispatch.policies.measurements.schema import CalibrationFile, read_calibration
from tests.support.simulated import H200, Device, Noise

Calibrate = Callable[[Path, int, Noise], CalibrationFile]


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch) -> Calibrate:
    """Calibrates deepseek-v3 in a directory, as another process on the same machine for each number."""

    def run(directory: Path, session: int, noise: Noise) -> CalibrationFile:
        monkeypatch.setattr(Machine, "inspect", lambda _device=None: H200)
        monkeypatch.setattr(campaign, "compile_ahead", lambda *_, **__: [])
        monkeypatch.setattr(campaign, "WorkerProcess", lambda *_: Device(noise, session))
        report = module.calibrate(["deepseek-v3"], ["fp8", "bf16"], directory=directory, most_configs=12)
        return read_calibration(report.path, H200)

    return run


@dataclass(frozen=True)
class Case:
    """How much two calibrations must agree."""

    noise: Noise
    independent: float
    in_a_row: float


CASES = (
    Case(Noise(), 0.97, 1.0),
    Case(Noise(sample=0.01, session=0.002), 0.9, 0.95),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=("an H200's noise", "much noise"))
def test_calibrations_agree_on_the_winner(tmp_path: Path, calibrate: Calibrate, case: Case) -> None:
    first = calibrate(tmp_path / "a", 1, case.noise)
    independent = agreement.summary(agreement.compare(first, calibrate(tmp_path / "b", 2, case.noise)))["calibrated"]
    in_a_row = agreement.summary(agreement.compare(first, calibrate(tmp_path / "a", 3, case.noise)))["calibrated"]
    assert independent["points"] >= 60
    assert independent["agree"] >= case.independent
    assert in_a_row["agree"] >= case.in_a_row
    assert max(independent["apart"], in_a_row["apart"]) < 0.03
    assert max(independent["mean"], in_a_row["mean"]) < 0.005
