"""Whether calibrations of one machine agree, on a simulated one: what is decided here is decided by the same code."""

from pathlib import Path

import pytest
import torch

from moe_dispatch.benchmarks.record import agreement
from moe_dispatch.policies.calibration.request import CalibrationRequest
from moe_dispatch.policies.calibration.run import CalibrationRun
from moe_dispatch.policies.measurements.schema import CalibrationFile, LayerShape, read_calibration
from moe_dispatch.problem import DType
from moe_dispatch.workloads import WORKLOADS
from tests.support.simulated import H200, H200_NOISE, Noise, SimulatedWorker, as_on_an_h200

DTYPES: tuple[DType, ...] = ("fp8", "bf16")


def calibrate(directory: Path, session: int, noise: Noise) -> CalibrationFile:
    """Calibrate deepseek-v3 in a directory, as another process on the same machine for each session."""
    request = CalibrationRequest(
        machine=H200,
        device=torch.device("cuda:0"),
        layers=tuple(LayerShape.of(WORKLOADS["deepseek-v3"].problem(1, dtype, H200)) for dtype in DTYPES),
        modes=("graph", "eager"),
        most_configs=12,
        directory=directory,
    )
    CalibrationRun(request, start_worker=lambda *_: SimulatedWorker(as_on_an_h200, noise, session)).measure()
    return read_calibration(request.path, H200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "least", "least_in_a_row"),
    [(H200_NOISE, 0.97, 1.0), (Noise(sample=0.01, drift=0.01, session=0.002), 0.9, 0.95)],
    ids=("an H200's noise", "much noise"),
)
def test_calibrations_agree_on_the_winner(tmp_path: Path, noise: Noise, least: float, least_in_a_row: float) -> None:
    first = calibrate(tmp_path / "a", 1, noise)
    independent = agreement.summary(agreement.compare(first, calibrate(tmp_path / "b", 2, noise)))["calibrated"]
    in_a_row = agreement.summary(agreement.compare(first, calibrate(tmp_path / "a", 3, noise)))["calibrated"]
    assert independent["points"] >= 60
    assert independent["agree"] >= least
    assert in_a_row["agree"] >= least_in_a_row
    assert max(independent["apart"], in_a_row["apart"]) < 0.03
    assert max(independent["mean"], in_a_row["mean"]) < 0.005
