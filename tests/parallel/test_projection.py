"""The projection onto more GPUs, against sums done here."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_dispatch.benchmarks.record import json_lines
from moe_dispatch.benchmarks.record import projection as record
from moe_dispatch.commands.app import app
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.machine import Machine
from moe_dispatch.parallel.exchange_times import ParallelCalibration
from moe_dispatch.parallel.links import CLUSTERS, crossing, distinct_groups, slots_of_busiest
from moe_dispatch.parallel.projection import Projection
from moe_dispatch.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
HGX = CLUSTERS["hgx-h200"]
LAYER = WORKLOADS["deepseek-v3"]
pytestmark = pytest.mark.usefixtures("compiling")


@pytest.fixture
def projection() -> Projection:
    return Projection(Machine.load("h200"), HGX)


def test_how_many_ranks_a_token_needs() -> None:
    # Of 4 experts on 2 ranks, 2 chosen: both on one rank in 2 of the 6 pairs.
    assert distinct_groups(4, 2, 2) == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert distinct_groups(256, 8, 8) == pytest.approx(5.3, abs=0.05)
    assert distinct_groups(8, 1, 1) == 1


@pytest.mark.parametrize(("tokens", "E", "topk", "ranks"), [(2, 256, 8, 2), (64, 128, 8, 4), (64, 256, 8, 64)])
def test_the_busiest_rank_has_as_many_slots_as_when_drawn(tokens: int, E: int, topk: int, ranks: int) -> None:
    drawn = torch.rand(300, tokens, E, generator=torch.Generator().manual_seed(0)).topk(topk).indices
    slots = torch.nn.functional.one_hot(drawn.flatten(1) // (E // ranks), ranks).sum(1)
    assert slots_of_busiest(tokens, E, topk, ranks) == pytest.approx(float(slots.amax(1).float().mean()), rel=0.06)


def test_rows_cross_at_the_links_rates() -> None:
    row = 2.0 * LAYER.K
    inside, stores = HGX.inside, HGX.direct
    two = crossing(HGX, 2, 4096, row, LAYER.E, LAYER.topk)
    assert two.gather == pytest.approx(inside.latency_us + 4096 * row / inside.bytes_per_us)
    assert two.gather * 0.99 < two.alltoall < two.gather
    assert two.direct == pytest.approx(stores.latency_us + 4096 * row / stores.bytes_per_us)
    many = crossing(HGX, 64, 4096, row, LAYER.E, LAYER.topk)
    assert many.gather == pytest.approx(inside.latency_us + 4096 * row * 7 * 8 / inside.bytes_per_us)
    assert many.alltoall_by_node < many.alltoall < many.gather
    assert many.direct == math.inf


def test_a_projection_is_the_sum_of_its_parts(projection: Projection) -> None:
    two = projection.project(LAYER, "fp8", 4096, 2)
    assert two.us == pytest.approx(two.experts_us + two.dispatch_us + two.combine_us - two.early_us)
    assert two.serial == pytest.approx(two.one_gpu_us / two.us)
    # Results leave while each is summed of the rows of its slots, half of which are here.
    assert two.early_us == pytest.approx(2 * 4096 * LAYER.topk / 2 * 2 * LAYER.K / 4.3e6)
    assert 1.5 < two.serial < two.overlapped < 2.05
    assert two.experts_us == pytest.approx(two.one_gpu_us / 2, rel=0.05)
    fewest = projection.project(LAYER, "fp8", 1, 2)
    assert fewest.experts_us == pytest.approx(fewest.one_gpu_us / 2 * 9.6 / 8, rel=0.1)
    fp8 = projection.project(LAYER, "fp8", 4096, 2, wire_fp8=True)
    assert fp8.dispatch_us < 0.6 * two.dispatch_us
    assert fp8.combine_us == two.combine_us
    # A card that rests before few calls multiplies faster; reading is as fast.
    rested, many, decode = (
        projection.project(LAYER, "fp8", M, 2, calls=calls) for M, calls in ((4096, 1), (4096, 8), (1, 8))
    )
    assert two.one_gpu_us * 0.9 < rested.one_gpu_us < many.one_gpu_us * 0.97 < many.one_gpu_us < two.one_gpu_us
    assert decode.one_gpu_us == pytest.approx(fewest.one_gpu_us, rel=0.01)
    most = projection.project(LAYER, "fp8", 16384, 64)
    assert math.isfinite(most.serial)
    assert most.experts_us < most.transfer_us


def test_by_columns_every_rank_has_all_slots(projection: Projection) -> None:
    by_columns = partial(projection.project, LAYER, "fp8", division="columns")
    half = projection.project(LAYER.sharded(2), "fp8", 4096, 2)
    two = by_columns(4096, 2)
    assert two.experts_us == half.one_gpu_us, "one GPU with half of each expert's columns"
    assert two.dispatch_us == half.dispatch_us
    assert two.early_us == two.combine_us - HGX.direct.latency_us < 2 * half.early_us, "sums take longer than links do"
    assert by_columns(1, 2).experts_us < projection.project(LAYER, "fp8", 1, 2).experts_us, "none is the busiest"
    assert by_columns(16, 16).exchange == "gather", "an all-to-all would send all rows to all ranks, too"
    with pytest.raises(InvalidInputError, match="multiple of 64 × 128"):
        by_columns(16, 64)


def test_numbers_of_gpus_that_do_not_fit_are_refused(projection: Projection) -> None:
    for ranks in (1, 3, 12):
        with pytest.raises(InvalidInputError, match=f"got {ranks}"):
            projection.project(LAYER, "fp8", 16, ranks)


def test_explain_prints_the_projection() -> None:
    command = ["explain", "--model", "deepseek-v3", "--dtype", "fp8", "--machine", "h200", "--tokens", "16,4096"]
    result = CliRunner().invoke(app, [*command, "--parallel", "2,8"])
    assert result.exit_code == 0, result.output
    assert "A projection: none of these times was measured on more than one GPU" in result.output
    table = [line.split() for line in result.output.splitlines() if line.split()[:2] in (["16", "2"], ["4096", "8"])]
    assert [row[2] for row in table] == ["experts", "columns"] * 2
    assert table[0][-3:] == ["direct", "1.89", "1.91"]
    printed = json.loads(CliRunner().invoke(app, [*command, "--parallel", "2,8", "--json"]).output)
    row = printed["rows"][0]
    assert (row["M"], row["ranks"], row["exchange"], round(row["serial"], 2)) == (16, 2, "direct", 1.89)
    assert [each["division"] for each in printed["rows"][:2]] == ["experts", "columns"]


def test_a_machine_without_cost_models_is_refused_with_what_to_do() -> None:
    result = CliRunner().invoke(app, ["explain", "--machine", "mi300x", "--parallel", "2"])
    assert result.exit_code == 2
    assert re.search(
        r"no cost model for .* on AMD.*--machine h200.*`moe-dispatch fit`", " ".join(result.output.split())
    )


def test_links_and_docs_follow_from_the_record() -> None:
    docs = (ROOT / "docs" / "expert-parallel.md").read_text(encoding="utf-8")
    command = next(line for line in docs.splitlines() if line.startswith("python -m moe_dispatch.benchmarks project"))
    first, *others = (json_lines.read(ROOT / name) for name in command.split()[4:])
    calibration = ParallelCalibration.model_validate(first[0])
    for link in (HGX.direct, HGX.inside):
        latency, rate = record.lines(calibration)[link.name]
        assert (round(latency, 1), round(rate, -3)) == (link.latency_us, link.bytes_per_us)
    assert record.markdown(calibration, [row for rows in others for row in rows]) in docs
    with pytest.raises(InvalidInputError, match="lacks links of direct and gather"):
        record.lines(calibration.model_copy(update={"links": ()}))
