"""Calibration files as they are found in the wild, and what the policy makes of them."""

import dataclasses
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dispatch.backends.reference import ReferenceConfig
from moe_dispatch.errors import InvalidInputError, MoEDispatchWarning, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import CalibratedPolicy, calibration_path
from moe_dispatch.policies.measurements.merge import promote_winners, require_writable, save
from moe_dispatch.policies.measurements.schema import Candidate, Identity, LayerShape, Measurement, read_calibration
from moe_dispatch.policies.measurements.table import EnergyTable, LayerTable, stable_winners, tables
from moe_dispatch.policies.measurements.versions import relevant_versions
from moe_dispatch.problem import Mode
from moe_dispatch.registry import BACKENDS
from moe_dispatch.settings import Settings, settings
from moe_dispatch.workloads import WORKLOADS, Workload
from tests.support.fakes import Honest, registered

MACHINE = Machine.inspect("cpu")
Scores = dict[int, dict[Identity, float | None]]
LAYER = Workload("tiny", E=8, topk=2, K=64, N=32)


def measured(
    M: int,
    us: float | None,
    backend: str = "reference",
    *,
    mode: Mode = "eager",
    layer: Workload = LAYER,
    config: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    joules: float | None = None,
) -> Measurement:
    """A measurement of a backend under today's versions, unless others are given."""
    if versions is None:
        versions = relevant_versions(BACKENDS.load(backend)(MACHINE)) if backend in BACKENDS.names() else {}
    shape = LayerShape.of(layer.problem(1, "fp32", MACHINE))
    candidate = Candidate(backend=backend, config=config or {}, versions=versions)
    if us is None:
        return Measurement(shape, M, mode, candidate, disqualified="x")
    return Measurement(shape, M, mode, candidate, us={"uniform": (us, us, us)}, score=us, joules=joules)


def ids(letters: str) -> list[Identity]:
    return [(letter, ()) for letter in letters]


@pytest.fixture
def path() -> Path:
    return Path(calibration_path(MACHINE))


def ranked(M: int, policy: CalibratedPolicy | None = None) -> list[str]:
    policy = policy or CalibratedPolicy(MACHINE)
    return [choice.backend for choice in policy.rank(LAYER.problem(M, "fp32", MACHINE))]


def test_a_record_from_before_a_configuration_got_a_field_is_of_its_default(path: Path) -> None:
    today = ReferenceConfig().model_dump(mode="json")
    measurements = [measured(1, 5.0, config={}), measured(8, 5.0, config=today)]
    save(path, [*measurements, measured(1, 4.0, "torch_grouped"), measured(8, 50.0, "torch_grouped")], MACHINE)
    assert ranked(3) == ["reference", "torch_grouped"]


def _edit(*keys: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    def edit(data: dict[str, Any]) -> object:
        inner: Any = data
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return data

    return edit


MEASUREMENT = ("points", 0, "measurements", 0)
# Ways to spoil a good file, and what the refusal must say.
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "truncated": (lambda data: json.dumps(data)[:-40], "is damaged"),
    "other-schema": (_edit("schema_version", value=2), "has schema version 2"),
    "other-machine": (_edit("machine", "name", value="NVIDIA H200"), "was measured on 'NVIDIA H200'"),
    "no-machine": (_edit("machine", "device", value="tpu"), "is damaged: machine.device"),
    "unknown-field": (_edit("run_me", value="rm -rf"), "is damaged: run_me"),
    "nan": (lambda data: json.dumps(_edit(*MEASUREMENT, "score", value=float("nan"))(data)), "is damaged"),
    "negative": (_edit(*MEASUREMENT, "score", value=-1.0), "is damaged"),
    "no-energy": (_edit(*MEASUREMENT, "joules", value=0.0), "is damaged"),
    "score-as-text": (_edit(*MEASUREMENT, "score", value="1.0"), "is damaged"),
    "index-out-of-range": (_edit(*MEASUREMENT, "candidate", value=9), "refers to candidate 9"),
    "origin-out-of-range": (_edit("candidates", 0, "origin", value=9), "refers to origin 9"),
    "uneven-scores": (_edit("scores", value={"layer": [0], "M": [1, 2]}), "must be of one length"),
    "path-as-backend": (_edit("candidates", 0, "backend", value="../../x:Y"), "candidates.0.backend"),
}


@pytest.mark.parametrize(("spoil", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_cannot_be_trusted_is_refused_with_the_reason(
    path: Path, spoil: Callable[[dict[str, Any]], object], says: str
) -> None:
    save(path, [measured(1, 5.0)], MACHINE)
    spoilt = spoil(json.loads(path.read_text(encoding="utf-8")))
    content = spoilt if isinstance(spoilt, (str, bytes)) else json.dumps(spoilt)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.warns(MoEDispatchWarning, match="calibrated"):
        policy = CalibratedPolicy(MACHINE)
    assert ranked(1, policy) == []
    assert says in policy.notes()[0]


def test_a_newer_versions_file_is_left_as_it_is(path: Path) -> None:
    """Two environments may share a cache: the older one took the newer one's measurements out of use."""
    save(path, [measured(1, 5.0)], MACHINE)
    newer = path.read_text(encoding="utf-8").replace('"schema_version":1', '"from_the_future":[1],"schema_version":2')
    path.write_text(newer, encoding="utf-8")
    writes: tuple[Callable[[], None], ...] = (
        lambda: save(path, [measured(1, 4.0)], MACHINE),
        lambda: promote_winners(path, MACHINE),
        lambda: require_writable(path),
    )
    for write in writes:
        with pytest.raises(PolicyFileError, match=r"schema version 2 .* reads 1; .*newer.*MOE_DISPATCH_CACHE_DIR"):
            write()
    assert path.read_text(encoding="utf-8") == newer
    assert not list(path.parent.glob("*.damaged*"))


def test_an_unknown_backend_and_an_unknown_configuration_are_ignored_with_a_note(path: Path) -> None:
    rows = [
        measured(1, 5.0),
        measured(1, 1.0, "from_the_future"),
        measured(1, 2.0, "torch_grouped", config={"warp_drive": True}),
    ]
    save(path, rows, MACHINE)
    policy = CalibratedPolicy(MACHINE)
    assert ranked(1, policy) == ["reference"]
    assert any("from_the_future: no such backend" in note for note in policy.notes())
    assert any("torch_grouped: its configuration is unknown here (warp_drive" in note for note in policy.notes())


def test_a_backend_whose_constructor_raises_is_ignored_with_a_note(path: Path) -> None:
    class Unlicensed(Honest):
        name = "unlicensed"

        def __init__(self, machine: Machine) -> None:
            raise OSError(f"the licence server of {machine.name} is down")

    with registered(Unlicensed):
        save(path, [measured(4, 5.0), measured(4, 1.0, "unlicensed", versions={})], MACHINE)
        assert ranked(4) == ["reference"]
        assert "unlicensed: cannot be made: OSError: the licence server" in CalibratedPolicy(MACHINE).notes()[0]


def test_another_version_retires_what_depends_on_it_and_nothing_else(path: Path) -> None:
    old = {**relevant_versions(BACKENDS.load("torch_grouped")(MACHINE)), "torch": "1.0"}
    save(path, [measured(1, 5.0), measured(1, 1.0, "torch_grouped", versions=old)], MACHINE)
    policy = CalibratedPolicy(MACHINE)
    assert ranked(1, policy) == ["reference"]
    assert f"torch_grouped: retired by torch 1.0 -> {MACHINE.torch}" in policy.notes()[0]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    save(path, [measured(1, 5.0)], MACHINE)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(PolicyFileError, match="what was there is untouched"):
            save(path, [measured(M, 5.0) for M in range(2, 2000)], MACHINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


def test_another_user_may_read_what_was_measured(path: Path) -> None:
    """As the user of a container reads what root measured when the image was built."""
    before = os.umask(0o022)
    try:
        save(path, [measured(1, 5.0)], MACHINE)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def _write(path: Path, first: int) -> None:
    for M in range(first, first + 20, 2):
        save(path, [measured(M, float(M))], MACHINE)


def test_two_writers_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, first)) for first in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [point.M for point in read_calibration(path, MACHINE).points] == list(range(1, 21))


def test_neighbours_decide_between_them(path: Path) -> None:
    rows = [measured(4, 10.0), measured(4, 20.0, "torch_grouped")]
    rows += [measured(64, 90.0), measured(64, 20.0, "torch_grouped")]
    save(path, rows, MACHINE)
    assert ranked(4) == ranked(5) == ["reference", "torch_grouped"]
    assert ranked(64) == ranked(60) == ["torch_grouped", "reference"]
    assert ranked(200) == ranked(256) == ["torch_grouped", "reference"]
    assert ranked(1) == ["reference", "torch_grouped"]
    assert ranked(257) == [], "what wins while weights are read says little of many tokens"


def test_times_that_grow_with_the_tokens_decide_far_above_them(path: Path) -> None:
    save(path, [measured(M, 5.0 * M**0.85) for M in (16, 64)], MACHINE)
    assert ranked(257) == ranked(64 * 64) == ["reference"]
    assert ranked(64 * 65) == []


def test_a_mode_that_was_not_measured_borrows_and_says_so(path: Path) -> None:
    save(path, [measured(4, 10.0)], MACHINE)
    choice = CalibratedPolicy(MACHINE).rank(LAYER.problem(4, "fp32", MACHINE, "graph"))[0]
    assert choice.reason == "10.0 µs at M=4 (eager; graph was not measured)"


def test_energy_decides_where_the_token_counts_around_have_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [measured(M, 10.0 * M, joules=0.004 * M) for M in (16, 64)]
    rows += [measured(M, 10.5 * M, "torch_grouped", joules=0.002 * M) for M in (16, 64)]
    save(path, [*rows, measured(128, 1000.0), measured(128, 1100.0, "torch_grouped")], MACHINE)
    save(path, [measured(M, 20.0 * M, "triton_vector") for M in (16, 64)], MACHINE)  # the energies of others are kept
    by_time = [ranked(M) for M in (16, 32, 64, 100, 128)]
    assert {names[0] for names in by_time} == {"reference"}
    monkeypatch.setenv("MOE_DISPATCH_MINIMIZE", "energy")
    settings.cache_clear()
    by_energy = ["torch_grouped", "reference", "triton_vector"]
    assert [ranked(M) for M in (16, 32, 64, 100, 128)] == [by_energy] * 3 + by_time[3:]
    least, second, _ = CalibratedPolicy(MACHINE).rank(LAYER.problem(32, "fp32", MACHINE))
    where = "between M=16 and M=64 (eager), 100 %"
    assert least.reason == f"2 mJ a token and 336.0 µs {where} ahead of reference, 5 % slower"
    assert second.reason == f"4 mJ a token and 320.0 µs {where} behind torch_grouped, 5 % faster"
    assert least.us == pytest.approx(336.0)
    assert path.read_text(encoding="utf-8").count("joules") == 4  # a version without energies reads a file without any
    monkeypatch.setenv("MOE_DISPATCH_MINIMIZE", "power")
    with pytest.raises(InvalidInputError, match="MOE_DISPATCH_MINIMIZE must be time or energy, got 'power'"):
        Settings.from_environment()


@pytest.mark.parametrize(("lag", "first"), [(1.015, "torch_grouped"), (1.025, "reference")])
def test_an_incumbent_stays_while_it_is_near_the_fastest(path: Path, lag: float, first: str) -> None:
    incumbent = dataclasses.replace(measured(8, 100.0 * lag, "torch_grouped"), incumbent=True)
    save(path, [measured(8, 100.0), incumbent], MACHINE)
    assert ranked(8)[0] == first


def test_what_won_by_time_has_no_lead_by_energy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incumbent = dataclasses.replace(measured(8, 100.0, joules=1.01), incumbent=True)
    save(path, [incumbent, measured(8, 100.5, "torch_grouped", joules=0.995)], MACHINE)
    assert ranked(8)[0] == "reference"
    monkeypatch.setenv("MOE_DISPATCH_MINIMIZE", "energy")
    settings.cache_clear()
    assert ranked(8)[0] == "torch_grouped"


def test_disqualified_at_a_neighbour_is_not_trusted_between(path: Path) -> None:
    rows = [measured(4, 10.0), measured(64, 50.0), measured(4, 5.0, "torch_grouped")]
    save(path, [*rows, measured(64, None, "torch_grouped")], MACHINE)
    assert ranked(4)[0] == "torch_grouped"
    assert ranked(16) == ranked(64) == ["reference"]


def test_within_noise_the_choice_of_more_token_counts_wins() -> None:
    one, other = ids("ab")
    scores: Scores = {1: {one: 10.0, other: 20.0}, 2: {one: 10.1, other: 10.0}, 4: {one: 10.0, other: 20.0}}
    assert set(stable_winners(scores).values()) == {one}
    scores[2][one] = 11.0
    assert stable_winners(scores) == {1: one, 2: other, 4: one}
    assert LayerTable(scores).rank(2)[0] == (other, 10.0)


def test_what_noise_does_at_one_token_count_is_outvoted() -> None:
    one, two, three = ids("abc")
    # `one` is within noise at most of them, though it is nowhere the fastest.
    scores: Scores = {
        1: {one: 10.03, two: 10.0, three: 10.3},
        2: {one: 20.06, three: 20.0, two: 30.0},
        4: {two: 40.0, one: 40.12, three: 50.0},
        8: {three: 80.0, one: 90.0, two: 88.0},
    }
    assert stable_winners(scores) == {1: one, 2: one, 4: one, 8: three}
    assert list(stable_winners(scores)) == list(scores)


def test_a_candidate_at_the_border_of_noise_decides_for_no_other_token_count() -> None:
    one, other, third = ids("abc")

    def winners(lag: float) -> list[Identity]:
        scores: Scores = {
            1: {one: 10.0, other: 10.0 * (1 + lag)},
            2: {one: 20.0, other: 20.0},
            4: {one: 40.0, other: 40.0},
            8: {one: 100.0, other: 80.7, third: 80.0},
        }
        return list(stable_winners(scores).values())

    assert winners(0.0124) == winners(0.0126) == [one, one, one, third]


def test_neighbours_far_apart_decide_nothing_between_them() -> None:
    (one,) = ids("a")
    table = LayerTable({1: {one: 10.0}, 16: {one: 40.0}, 512: {one: 90.0}})
    assert [M for M in (1, 4, 16, 17, 511, 512) if table.rank(M)] == [1, 4, 16, 512]


def test_a_candidate_that_was_eliminated_at_a_neighbour_is_not_chosen_beside_it() -> None:
    even, decoder = ids("ab")
    # `decoder` was measured at 1 and 64, and eliminated between them: its curve from 1 to 64 does not hold at 8.
    table = LayerTable({1: {even: 20.0, decoder: 10.0}, 4: {even: 40.0}, 16: {even: 80.0}, 64: {decoder: 90.0}})
    assert [identity for identity, _ in table.rank(8)] == [even]
    assert not table.rank(32)


def test_a_backend_that_wins_on_both_sides_in_different_configurations_wins_between() -> None:
    few, many, other = ("a", (("rows", 8),)), ("a", (("rows", 16),)), ("b", ())
    # gpt-oss-120b in MXFP4 on an H200: split-K by slot, by expert, and triton_persistent in one configuration.
    scores: Scores = {2: {few: 55.8, other: 72.1}, 4: {many: 90.4, other: 107.6}, 16: {many: 224.0, other: 220.0}}
    table = LayerTable(scores)
    ranked = dict(table.rank(3))
    assert list(ranked) == [many, other]  # whose token count is nearer
    assert 74.0 < ranked[many] < ranked[other]  # it was eliminated at the other one
    assert LayerTable({20: scores[2], 40: scores[4]}).rank(25)[0][0] == few
    assert few not in dict(table.rank(8))  # another backend wins at 16
    # Energies were measured of the winners alone.
    by_energy = EnergyTable(table, LayerTable({2: {few: 0.2}, 4: {many: 0.3}}))
    first, second = by_energy.choices(3, "graph", "calibrated")
    assert (first.backend, first.config, second.backend) == ("a", {"rows": 16}, "b")
    assert first.us == pytest.approx(ranked[many])
    scores[4][few] = None  # its result was wrong there
    assert [identity for identity, _ in LayerTable(scores).rank(3)] == [many, other]
    assert LayerTable({20: scores[2], 40: scores[4]}).rank(25)[0][0] == many


def test_later_measurements_outvote_no_winner_that_was_promoted(path: Path) -> None:
    one, other = {"compute_fp32": True}, {"compute_fp32": False}

    def at(M: int, us: float, other_us: float) -> list[Measurement]:
        return [measured(M, us, config=one), measured(M, other_us, config=other)]

    def winners() -> dict[int, object]:
        (table,) = tables(read_calibration(path, MACHINE)).values()
        return {M: dict(config)["compute_fp32"] for M, (_, config) in table.winners.items()}

    later = at(4, 10.1, 10.0) + at(8, 10.2, 10.0)
    save(path, at(1, 10.0, 10.1), MACHINE)
    assert winners() == {1: True}
    before = path.read_bytes()
    save(path, later, MACHINE)
    assert winners() == {1: False, 4: False, 8: False}
    path.write_bytes(before)
    promote_winners(path, MACHINE)
    save(path, later, MACHINE)
    assert winners() == {1: True, 4: False, 8: False}


@pytest.mark.timing
def test_a_full_calibration_loads_within_50_ms(path: Path) -> None:
    configs = [{"compute_fp32": a, "quantize_activations": b} for a in (False, True) for b in (False, True)]
    names = [name for name in BACKENDS.names() if name != "reference"]
    rows = []
    modes: tuple[Mode, Mode] = ("graph", "eager")
    for layer in WORKLOADS.values():
        for M in (2**i for i in range(15)):
            for mode in modes:
                rows += [measured(M, 5.0 + i, mode=mode, layer=layer, config=c) for i, c in enumerate(configs)]
                # Unknown here on purpose: loading must not pay for what it cannot use either.
                rows += [
                    measured(M, 9.0, name, mode=mode, layer=layer, config={"block_m": 16 << i}, versions={})
                    for name in names
                    for i in range(4)
                ]
    save(path, rows, MACHINE)
    problem = WORKLOADS["qwen3-235b"].problem(64, "fp32", MACHINE)
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        assert CalibratedPolicy(MACHINE).rank(problem)
        seconds.append(time.process_time() - begin)
    assert min(seconds) <= 0.050
