"""Whether calibrations of one machine agree, on a simulated one: what decides here is what decides on a real one."""

from pathlib import Path

import pytest
import torch

from moe_dispatch.policies.calibration.request import CalibrationRequest
from moe_dispatch.policies.calibration.run import CalibrationRun
from moe_dispatch.policies.measurements.schema import CalibrationFile, LayerShape, read_calibration
from moe_dispatch.policies.measurements.table import tables
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


def losses(first: CalibrationFile, later: CalibrationFile) -> list[float | None]:
    """How far the first one's winners are behind the later one's, by its times; None where they are the same."""
    lost: list[float | None] = []
    before = tables(first)
    for key, table in tables(later).items():
        for M in table.winners.keys() & before[key].winners.keys():  # each may have refined elsewhere
            chosen, winner = before[key].winners[M], table.winners[M]
            us, winner_us = table.scores[M][chosen], table.scores[M][winner]
            assert us
            assert winner_us
            lost.append(None if chosen == winner else us / winner_us - 1)
    return lost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "least", "least_in_a_row"),
    [(H200_NOISE, 0.97, 1.0), (Noise(sample=0.01, drift=0.01, session=0.002), 0.9, 0.95)],
    ids=("an H200's noise", "much noise"),
)
def test_calibrations_agree_on_the_winner(tmp_path: Path, noise: Noise, least: float, least_in_a_row: float) -> None:
    first = calibrate(tmp_path / "a", 1, noise)
    for share, folder, session in ((least, "b", 2), (least_in_a_row, "a", 3)):
        later = calibrate(tmp_path / folder, session, noise)
        lost = losses(first, later)
        assert len(lost) >= 60
        assert lost.count(None) >= share * len(lost)
        assert max(filter(None, lost), default=0.0) < 0.03
