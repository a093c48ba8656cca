"""Merging, winners and policy files, for any measurements and any damage."""

import functools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_dispatch.machine import Machine
from moe_dispatch.policies.measurements.merge import merge, promote_winners, save, with_winners_promoted
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Candidate,
    Identity,
    LayerShape,
    Measurement,
    parse_calibration,
    read_calibration,
)
from moe_dispatch.policies.measurements.table import NOISE, STAYS, LayerTable, stable_winners, tables
from moe_dispatch.problem import Mode

MACHINE = Machine.load("h200")
ANY_CLOCK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
EMPTY = CalibrationFile(machine=MACHINE)

times = st.floats(0.5, 1e6)
tokens = st.sampled_from([1, 1 << 30])  # few points, so that measurements meet at them
layer = functools.partial(LayerShape, N=64, E=8, topk=2, act_dtype="bf16")
layers = st.builds(layer, K=st.just(128), dtype=st.sampled_from(["bf16", "fp8"]))
candidates = st.builds(
    Candidate,
    backend=st.sampled_from(["reference", "torch_grouped", "from_the_future"]),
    config=st.dictionaries(st.sampled_from(["block_m", "split"]), st.integers(0, 3) | st.booleans(), max_size=2),
    versions=st.dictionaries(st.sampled_from(["torch", "driver"]), st.sampled_from(["1", "2"]), max_size=2),
)
modes: st.SearchStrategy[Mode] = st.sampled_from(("graph", "eager"))


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    layer, M, mode = draw(layers), draw(tokens), draw(modes)
    us = draw(times)
    if draw(st.booleans()):
        return Measurement(layer, M, mode, draw(candidates), disqualified=draw(st.text(max_size=20)))
    error = draw(st.none() | st.floats(0, 1))
    return Measurement(layer, M, mode, draw(candidates), us={"uniform": (us, us, us)}, score=us, error=error)


calibrations = st.lists(measurements(), max_size=12)


def by_key(file: CalibrationFile) -> dict[object, Measurement]:
    """The measurements of a file by point and candidate."""
    return {(one.point, one.candidate.identity): one for one in file.measurements()}


@ANY_CLOCK
@given(old=calibrations, news=calibrations)
def test_a_merge_replaces_what_the_new_backends_had_at_their_points_and_keeps_the_rest(
    old: list[Measurement], news: list[Measurement]
) -> None:
    held = merge(EMPTY, old, MACHINE)
    merged = by_key(merge(held, news, MACHINE))
    latest = {(one.point, one.candidate.identity): one for one in news}
    took_part = {(one.point, one.candidate.backend) for one in news}
    kept = {key: one for key, one in by_key(held).items() if (one.point, one.candidate.backend) not in took_part}
    assert merged == kept | latest


@ANY_CLOCK
@given(old=calibrations, news=calibrations)
def test_merging_twice_is_merging_once(old: list[Measurement], news: list[Measurement]) -> None:
    once = merge(merge(EMPTY, old, MACHINE), news, MACHINE)
    assert merge(once, news, MACHINE) == once


@ANY_CLOCK
@given(rows=calibrations)
def test_a_file_reads_as_it_was_written(rows: list[Measurement]) -> None:
    file = merge(EMPTY, rows, MACHINE)
    assert parse_calibration(file.model_dump_json().encode(), "it") == file
    assert merge(EMPTY, file.measurements(), MACHINE) == file


@ANY_CLOCK
@given(rows=calibrations)
def test_promoted_winners_are_still_the_winners(rows: list[Measurement]) -> None:
    file = merge(EMPTY, rows, MACHINE)
    promoted = with_winners_promoted(file)
    winners = {key: table.winners for key, table in tables(file).items()}
    assert {key: table.winners for key, table in tables(promoted).items()} == winners
    incumbents = [one for one in promoted.measurements() if one.incumbent]
    assert len(incumbents) == sum(map(len, winners.values()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration") / "machine.json"


@settings(ANY_CLOCK, max_examples=30)
@given(batches=st.lists(calibrations, min_size=1, max_size=3))
def test_what_was_saved_in_parts_is_what_was_merged_at_once(path: Path, batches: list[list[Measurement]]) -> None:
    path.unlink(missing_ok=True)
    expected = EMPTY
    for batch in batches:
        save(path, batch, MACHINE)
        expected = merge(expected, batch, MACHINE)
        promote_winners(path, MACHINE)
        expected = with_winners_promoted(expected)
    assert read_calibration(path, MACHINE) == expected


scores = st.dictionaries(
    st.integers(1, 1 << 20),
    st.dictionaries(st.sampled_from([("a", ()), ("b", ()), ("b", (("x", 1),)), ("c", ())]), times, min_size=1),
    min_size=1,
    max_size=6,
)


@ANY_CLOCK
@given(scores=scores, data=st.data())
def test_a_winner_is_within_noise_of_the_fastest(scores: dict[int, dict[Identity, float]], data: st.DataObject) -> None:
    incumbents = {M: data.draw(st.sampled_from(sorted(at, key=repr))) for M, at in scores.items()}
    plain, with_incumbents = stable_winners(scores), stable_winners(scores, incumbents)
    assert set(plain) == set(with_incumbents) == set(scores)
    for M, at in scores.items():
        assert at[plain[M]] <= min(at.values()) * (1 + NOISE)
        assert at[with_incumbents[M]] <= min(at.values()) * (1 + STAYS)
        if at[incumbents[M]] <= min(at.values()) * (1 + STAYS):
            assert with_incumbents[M] == incumbents[M]


@ANY_CLOCK
@given(scores=scores, M=st.integers(1, 1 << 26))
def test_a_table_ranks_each_backend_once_and_the_winner_first(scores: dict[int, dict[Identity, float]], M: int) -> None:
    table = LayerTable(scores)
    for asked in (M, *scores):
        ranked = table.rank(asked)
        backends = [backend for (backend, _), _ in ranked]
        assert len(set(backends)) == len(backends)
        assert all(us > 0 for _, us in ranked)
        assert [us for _, us in ranked[1:]] == sorted(us for _, us in ranked[1:])
        if asked in scores:
            assert ranked[0] == (table.winners[asked], scores[asked][table.winners[asked]])
