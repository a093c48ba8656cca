"""`calibrate --parallel` on two processes with gloo, and choices by what it stored."""

import itertools
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from moe_dispatch.commands.app import app
from moe_dispatch.errors import PolicyFileError
from moe_dispatch.parallel.calibration import save
from moe_dispatch.parallel.exchange_times import ExchangeTable, ParallelCalibration, Split, calibration_path, find, read
from moe_dispatch.parallel.expert_parallel import ExpertParallel
from moe_dispatch.parallel.links import fitted
from moe_dispatch.testing import make_inputs
from tests.parallel import programs
from tests.support.ranks import Ranks, ranks

MODEL = "8,2,32,16"  # as programs.LAYER


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(2, tmp_path_factory.mktemp("two")) as started:
        yield started


@pytest.fixture(scope="module")
def calibrated(two: Ranks) -> dict[str, Any]:
    """What the command prints on the first rank, after it ran on both."""
    (code, text), other = two.run(run_command)
    assert (code, *other) == (0, 0, ""), text
    printed: dict[str, Any] = json.loads(text)
    return printed


@pytest.fixture(scope="module")
def stored(calibrated: dict[str, Any]) -> ParallelCalibration:
    return ParallelCalibration.model_validate({key: calibrated[key] for key in ParallelCalibration.model_fields})


def run_command() -> tuple[int, str]:
    arguments = ["--parallel", "--model", MODEL, "--dtype", "fp32", "--tokens", "1,4", "--device", "cpu", "--json"]
    arguments += ["--division", "experts", "--division", "columns"]
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    return result.exit_code, result.output


def choices(tokens: list[int]) -> tuple[list[str], list[str], list[list[str]], list[str]]:
    """A new group's choices, what is said of them, the exchanges that warm_up runs at both ends, and warnings.

    The last rank has an empty cache of its own.
    """
    before = os.environ["MOE_DISPATCH_CACHE_DIR"]
    if dist.get_rank():
        os.environ["MOE_DISPATCH_CACHE_DIR"] = f"{before}/empty"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ep = ExpertParallel()
    os.environ["MOE_DISPATCH_CACHE_DIR"] = before
    layer = ep.split(make_inputs(programs.LAYER, programs.FP32, "cpu").experts)
    explained = [ep.explain(layer, 2, M) for M in tokens]
    warmed = [sorted(each.us) for each in ep.warm_up(layer, topk=2, tokens=tokens[:: max(1, len(tokens) - 1)])]
    return [each.chosen for each in explained], list(map(str, explained)), warmed, [str(w.message) for w in said]


def test_the_command_measures_links_and_layers(calibrated: dict[str, Any]) -> None:
    content = Path(calibrated["path"]).read_text(encoding="utf-8")
    stored = ParallelCalibration.model_validate_json(content)
    assert json.loads(content) == {key: calibrated[key] for key in json.loads(content)}
    assert stored.topology.hosts == (0, 0)
    by_tokens = {"sharded": ["gather", "alltoall"], "replicated": ["gather", "replicated"]}
    assert [(each.tokens, each.exchange) for each in stored.links] == [
        (tokens, name) for tokens, names in by_tokens.items() for name in names
    ]
    for link in stored.links:
        assert [count for count, _ in link.samples] == [4096 * M for M in (512, 128, 32, 8, 1)]
        assert (link.latency_us, link.bytes_per_us) == fitted([(count, us / 2) for count, us in link.samples])
    points = itertools.product(("experts", "columns"), by_tokens, (4, 1))
    assert [(each.kind.division, each.kind.tokens, each.kind.M) for each in stored.layers] == list(points)
    for point in stored.layers:
        by_columns = point.kind.division == "columns"
        N = 8 if by_columns else 16
        assert point.kind.N == N
        able = [name for name in by_tokens[point.kind.tokens] if not (by_columns and name == "alltoall")]
        assert list(point.splits) == able


def test_all_ranks_choose_by_the_calibration_of_rank_0(two: Ranks, calibrated: dict[str, Any]) -> None:
    path = Path(calibrated["path"])
    before = path.read_text(encoding="utf-8")
    stored = json.loads(before)
    for point in stored["layers"]:  # at one token 8 against 1 µs, at four 4 against 16
        at_four = point["kind"]["M"] == 4
        for name, us in (("gather", 4.0 if at_four else 8.0), ("alltoall", 16.0 if at_four else 1.0)):
            point["splits"][name] = {"us": us, "experts_us": us * 0.75, "transfers_us": us / 2}
    for link in stored["links"]:
        link |= {"latency_us": 1.0 if link["exchange"] == "alltoall" else 2.0, "bytes_per_us": 1e3}
    path.write_text(json.dumps(stored), encoding="utf-8")
    try:
        first, second = two.run(choices, [1, 2, 3, 4, 1000])
        names, texts, warmed, said = first
        assert second[:3] == first[:3]
        assert names == ["alltoall", "alltoall", "gather", "gather", "alltoall"]
        assert "-> alltoall: calibrated at M=1 as the fastest, 1.0 µs = experts 0.8 + exposed transfer 0.2" in texts[0]
        assert "(hidden 0.2)" in texts[0]
        assert "-> gather: calibrated at M=1 and 4 as the fastest, 4.6 µs" in texts[2]
        assert "-> alltoall: expected of the calibrated links as the fastest" in texts[4]
        assert warmed == [["alltoall"], ["alltoall", "gather"]], "by links alone nothing is left out"
        assert not said
        for content, why in (("{", "is damaged"), (json.dumps(stored | {"versions": {}}), "calibrate again")):
            path.write_text(content, encoding="utf-8")
            first, second = two.run(choices, [1])
            assert first[0] == second[0] == ["gather"]
            assert first[2] == [["alltoall", "gather"]]
            assert why in first[3][0]
            assert not second[3], "rank 0 reads alone"
    finally:
        path.write_text(before, encoding="utf-8")


def test_a_later_calibration_keeps_other_layers(stored: ParallelCalibration) -> None:
    older = stored
    fresh = older.layers[0].model_copy(update={"splits": {"gather": Split(us=3, experts_us=2, transfers_us=2)}})
    other = older.layers[1].model_copy(update={"kind": replace(older.layers[1].kind, E=16)})
    newer = older.model_copy(update={"layers": (fresh, other)})
    assert newer.with_layers_of(older).layers == (fresh, other, *older.layers[1:])
    assert newer.with_layers_of(older.model_copy(update={"versions": {}})) == newer


def test_a_damaged_file_is_set_aside(stored: ParallelCalibration, tmp_path: Path) -> None:
    path = tmp_path / "parallel.json"
    for content in ("{", stored.model_dump_json().replace('"schema_version":1', '"schema_version":0')):
        path.write_text(content, encoding="utf-8")
        save(path, stored)
        assert read(path, stored.topology) == stored
    kept = sorted(tmp_path.glob("parallel.json.damaged-*"))
    assert [len(each.read_text(encoding="utf-8")) for each in kept] == [1, len(stored.model_dump_json())]


def test_a_newer_file_is_left_as_it_is(stored: ParallelCalibration, tmp_path: Path) -> None:
    path = tmp_path / "parallel.json"
    content = stored.model_dump_json().replace('"schema_version":1', '"of":"later","schema_version":2')
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PolicyFileError, match=r"schema version 2 .* reads 1; .*newer.*MOE_DISPATCH_CACHE_DIR"):
        save(path, stored)
    assert path.read_text(encoding="utf-8") == content
    assert not list(tmp_path.glob("*.damaged-*"))


def test_beside_a_newer_file_every_rank_refuses_to_measure(two: Ranks, calibrated: dict[str, Any]) -> None:
    path = Path(calibrated["path"])
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace('"schema_version":1', '"schema_version":2'), encoding="utf-8")
    try:
        for code, text in two.run(run_command):
            assert code == 2, text
            assert "schema version 2" in text
    finally:
        path.write_text(before, encoding="utf-8")


def test_divisions_that_do_not_fit_are_refused() -> None:
    for arguments, said in (
        (["--parallel", "--division", "rows"], "must be experts or columns, got 'rows'"),
        (["--division", "columns"], "give --parallel, too"),
    ):
        result = CliRunner().invoke(app, ["calibrate", "--model", MODEL, *arguments])
        assert result.exit_code
        assert said in " ".join(f"{result.output} {result.exception}".split())


@pytest.mark.parametrize("own", ["{", '{"versions": {}}'], ids=["damaged", "of other versions"])
def test_an_own_file_without_use_does_not_hide_a_shared_one(
    stored: ParallelCalibration, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = stored
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", str(tmp_path))
    (tmp_path / f"{shared.topology.key}.json").write_text(shared.model_dump_json(), encoding="utf-8")
    path = calibration_path(shared.topology)
    path.parent.mkdir(parents=True)
    path.write_text(
        own if own == "{" else shared.model_copy(update=json.loads(own)).model_dump_json(), encoding="utf-8"
    )
    calibration, (reason,) = find(shared.topology, shared.versions)
    assert calibration == shared
    assert str(path) in reason


def test_nothing_is_interpolated_over_a_wide_gap(stored: ParallelCalibration) -> None:
    kind = stored.layers[0].kind
    wide = tuple(stored.layers[0].model_copy(update={"kind": replace(kind, M=M)}) for M in (1, 100))
    table = ExchangeTable(stored.model_copy(update={"layers": wide}))
    expected = [table.expected(replace(kind, M=M)) for M in (1, 10, 100)]
    assert [bool(each and each.splits) for each in expected] == [True, False, True]
    assert table.expected(replace(kind, mode="graph")) is None


def test_a_line_is_fitted_by_relative_errors() -> None:
    assert fitted([(size, 3.5 + size / 345) for size in (1, 1000, 10**6)]) == pytest.approx((3.5, 345))
    assert fitted([(1, 5.0), (1000, 5.0)]) == pytest.approx((5, 1e9))
    latency, rate = fitted([(100, 1.0), (200, 3.0)])
    assert latency == 0
    assert 67 < rate < 100
