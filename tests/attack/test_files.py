"""Files that are damaged, foreign or no files: refused by name or read rightly, no call breaks, nothing is lost."""

import contextlib
import datetime
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dispatch import Machine, MoEDispatchError, MoEProblem, moe_forward
from moe_dispatch.benchmarks.row_files import load, timed_keys
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.dispatch.process import reset_dispatchers
from moe_dispatch.dispatch.quarantine import Quarantine, QuarantineEntry
from moe_dispatch.errors import InvalidInputError, PolicyFileError
from moe_dispatch.machine import current_machine
from moe_dispatch.policies.calibrated import CalibratedPolicy, calibration_path
from moe_dispatch.policies.learned.cost_model import TERMS
from moe_dispatch.policies.learned.fit import save_model
from moe_dispatch.policies.learned.policy import CostModel, LearnedPolicy, ModelFile, model_path
from moe_dispatch.policies.measurements.merge import merge, save
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Candidate,
    LayerShape,
    Measurement,
    read_calibration,
)
from moe_dispatch.settings import settings
from moe_dispatch.system.libraries import library_version
from moe_dispatch.workloads import Workload, workload
from tests.attack.damage import Damage, damages, every_named_damage
from tests.attack.harness import answer_or_refusal, attack, watched
from tests.attack.oracle import assert_right, truth
from tests.attack.strategies import SMALL_CALL, make_call

AREA = "files"
IN_MEMORY = "/dev/shm"  # noqa: S108 - where writing through to a disk takes no time
MACHINE = current_machine("cpu")
PROBLEM = MoEProblem(
    M=3, K=16, N=16, E=4, topk=2, dtype="fp32", act_dtype="fp32", device="cpu", capability=None
)  # of SMALL_CALL


@pytest.fixture(autouse=True)
def _own_cache() -> Iterator[None]:
    """Restores the cache folder, which each input replaces."""
    before = os.environ["MOE_DISPATCH_CACHE_DIR"]
    yield
    os.environ["MOE_DISPATCH_CACHE_DIR"] = before
    os.environ.pop("MOE_DISPATCH_MACHINE", None)
    settings.cache_clear()


@contextlib.contextmanager
def fresh_cache() -> Iterator[Path]:
    """A cache folder of its own for an input, as a new process would find it."""
    folder = Path(tempfile.mkdtemp(prefix="attack-", dir=IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None))
    os.environ["MOE_DISPATCH_CACHE_DIR"] = str(folder)
    settings.cache_clear()
    reset_dispatchers()
    try:
        yield folder
    finally:
        for each in [folder, *folder.rglob("*")]:
            if not each.is_symlink() and each.is_dir():
                each.chmod(0o700)
        shutil.rmtree(folder)


def contents(folder: Path) -> list[bytes]:
    """What the regular files below a folder hold, but for locks and those of a size that only an attack has."""
    files = (
        path
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode) and path.stat().st_size < 1 << 24 and path.suffix != ".lock"
    )
    return [path.read_bytes() for path in files]


def place(folder: Path, path: Path, content: str, damage: Damage) -> list[bytes]:
    """Write a file below a folder and damage it; returns what files are there then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    damage.apply(path)
    return contents(folder)


def assert_the_layer_is_computed() -> None:
    call = make_call(SMALL_CALL)
    out = moe_forward(*call.arguments)
    assert_right(out, truth(call.hidden_states, call.layer, call.topk_weights, call.topk_ids), "fp32")


def measurement(us: float, M: int = 3, backend: str = "torch_grouped") -> Measurement:
    candidate, times = Candidate(backend=backend), {"uniform": (us, us, us)}
    return Measurement(LayerShape.of(PROBLEM), M, "eager", candidate, us=times, score=us, error=0.0)


CALIBRATION = merge(
    CalibrationFile(machine=MACHINE),
    [measurement(5.0), measurement(9.0, 3, "reference"), measurement(8.0, 64)],
    MACHINE,
)


@attack(900)
@every_named_damage()
@given(damage=damages)
def test_calibrations(damage: Damage) -> None:
    """A call is computed whatever the file is; a new measurement is saved, and what was there is kept."""
    with fresh_cache() as folder:
        path = calibration_path(MACHINE)
        before = place(folder, path, CALIBRATION.model_dump_json(), damage)
        try:
            valid = read_calibration(path, MACHINE)
        except (OSError, PolicyFileError):
            valid = None
        with watched(AREA):
            assert_the_layer_is_computed()
            policy = CalibratedPolicy(MACHINE)
            assert bool(policy.rank(PROBLEM)) <= (valid is not None)
            saved = answer_or_refusal(AREA, lambda: save(path, [measurement(1.0, 7)], MACHINE))
            if isinstance(saved, MoEDispatchError):
                assert sorted(contents(folder)) == sorted(before), "a save that failed changed something"
                return
            now = {
                (each.point, each.candidate.identity): each for each in read_calibration(path, MACHINE).measurements()
            }
            assert measurement(1.0, 7).point in {point for point, _ in now}
            for each in valid.measurements() if valid else ():
                assert (each.point, each.candidate.identity) in now, "a measurement is lost"
            kept = contents(folder)
            lost = [content for content in before if content not in kept]
            assert len(lost) <= (valid is not None), "a file that was no calibration is lost"


CRASHED = QuarantineEntry(
    backend="torch_grouped", problem=repr(PROBLEM.bucket), cause="crashed", fatal=True,
    when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    versions={
        "moe_dispatch": library_version("moe_dispatch"), "driver": MACHINE.driver, "cuda": MACHINE.cuda,
        "torch": MACHINE.torch, "triton": MACHINE.triton, **MACHINE.libraries,
    },
)  # fmt: skip


@attack(900)
@every_named_damage(reset=False)
@given(damage=damages, reset=st.booleans())
def test_quarantines(damage: Damage, *, reset: bool) -> None:
    """A call is computed, a new entry is obeyed by this process, and what was there is kept or set aside."""
    with fresh_cache() as folder:
        first = Quarantine(MACHINE)
        first.bar("torch_grouped", PROBLEM, "crashed", fatal=True)
        first.bar("honest", PROBLEM, "crashed", fatal=True)
        (path,) = folder.rglob("*.json")
        damage.apply(path)
        before = contents(folder)
        with watched(AREA):
            assert_the_layer_is_computed()
            known = {each.backend for each in Quarantine(MACHINE).entries()}
            after_reading = contents(folder)
            assert all(content in after_reading for content in before), "reading lost a file"
            quarantine = Quarantine(MACHINE)
            if reset:
                try:
                    quarantine.reset()
                except OSError:
                    return
                assert not Quarantine(MACHINE).entries()
            else:
                quarantine.bar("another", PROBLEM, "crashed", fatal=True)
                assert quarantine.cause("another", PROBLEM)
                now = {each.backend for each in Quarantine(MACHINE).entries()}
                assert known <= now, "an entry is lost"
            assert_the_layer_is_computed()


@attack(700)
@every_named_damage()
@given(damage=damages)
def test_markers(damage: Damage) -> None:
    """The marker of a dead process becomes an entry, or is set aside; no call breaks."""
    with fresh_cache() as folder:
        quarantine = Quarantine(MACHINE)
        quarantine.bar("honest", PROBLEM, "crashed", fatal=True)
        (path,) = folder.rglob("*.json")
        marker = path.with_name(f"{path.stem}.1-1.running")
        before = place(folder, marker, CRASHED.model_dump_json(), damage)
        with watched(AREA):
            assert_the_layer_is_computed()
            entries = {each.backend for each in Quarantine(MACHINE).entries()}
            assert "honest" in entries
            kept = contents(folder)
            for content in before:
                if content and content not in kept:  # an empty one says nothing: its process died as it made it
                    QuarantineEntry.model_validate_json(content) if b'"entries"' not in content else None
            if damage.name == "nothing":
                assert "torch_grouped" in entries


MODEL = ModelFile(
    fingerprint=MACHINE.fingerprint,
    sms=MACHINE.sms,
    cost_models=[
        CostModel(
            dtype="fp32", mode="eager", backend=backend, layers=3, points=20, most_rows=100.0, error=0.01,
            coefficients=dict.fromkeys(TERMS, 1.0),
        )
        for backend in ("torch_grouped", "reference")
    ],
)  # fmt: skip


@attack(500)
@every_named_damage()
@given(damage=damages)
def test_learned_models(damage: Damage) -> None:
    """A call is computed whatever the file is; a fit replaces it."""
    with fresh_cache() as folder:
        path = model_path(MACHINE)
        path.parent.mkdir(parents=True)
        save_model(MODEL, path)
        damage.apply(path)
        before = contents(folder)
        with watched(AREA):
            policy = LearnedPolicy(MACHINE)
            for choice in policy.rank(PROBLEM):
                assert choice.us is not None
                assert choice.us >= 0
            assert_the_layer_is_computed()
            assert sorted(contents(folder)) == sorted(before), "reading changed a file"
            saved = answer_or_refusal(AREA, lambda: save_model(MODEL, path))
            if not isinstance(saved, MoEDispatchError):
                assert LearnedPolicy(MACHINE).rank(PROBLEM)


@attack(700)
@every_named_damage(by_variable=False)
@given(damage=damages, by_variable=st.booleans())
def test_machine_descriptions(damage: Damage, *, by_variable: bool) -> None:
    with fresh_cache() as folder:
        path = folder / "machine.json"
        described = {"version": "0", "machine": Machine.load("h200").model_dump(mode="json")}
        before = place(folder, path, json.dumps(described), damage)
        with watched(AREA):
            if by_variable:
                os.environ["MOE_DISPATCH_MACHINE"] = str(path)
                machine = answer_or_refusal(AREA, Machine.inspect)
            else:
                machine = answer_or_refusal(AREA, lambda: Machine.load(path))
            assert isinstance(machine, Machine | InvalidInputError)
            if isinstance(machine, InvalidInputError):
                assert "machine.json" in str(machine)
            elif damage.name == "nothing":
                assert machine == Machine.load("h200")
            assert sorted(contents(folder)) == sorted(before), "reading changed a file"


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, object], tuple[int, int, int, int]]:
    """A config as some family writes it, and its E, topk, K and N."""
    E, topk, K, N = (draw(st.integers(*bounds)) for bounds in ((2, 300), (1, 2), (1, 9000), (1, 9000)))
    experts = draw(st.sampled_from(["num_experts", "n_routed_experts", "moe_num_experts"]))
    chosen = draw(st.sampled_from(["num_experts_per_tok", "moe_k", "top_k_experts"]))
    section: dict[str, object] = {
        "model_type": draw(st.sampled_from(["qwen3_moe", "deepseek_v3", "kimi_linear", "new_moe"])),
        experts: E, chosen: topk, "hidden_size": K, "moe_intermediate_size": N, "intermediate_size": N + 1,
        "hidden_act": "silu",
    }  # fmt: skip
    nested = draw(st.sampled_from(["", "text_config", "thinker_config"]))
    return ({nested: section, "model_type": "many_modes"} if nested else section), (E, topk, K, N)


SMALL_LAYER = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}
CONFIG = (SMALL_LAYER | {"model_type": "qwen3_moe", "hidden_act": "silu"}, (8, 2, 64, 32))


@attack(900)
@every_named_damage(config=CONFIG, as_folder=False)
@given(config=configurations(), damage=damages, as_folder=st.booleans())
def test_configs(
    config: tuple[dict[str, object], tuple[int, int, int, int]], damage: Damage, *, as_folder: bool
) -> None:
    data, letters = config
    with fresh_cache() as folder:
        path = folder / "config.json"
        before = place(folder, path, json.dumps(data), damage)
        with watched(AREA):
            layer = answer_or_refusal(AREA, lambda: workload(str(folder if as_folder else path)))
            if isinstance(layer, Workload):
                assert min(layer.E, layer.topk, layer.K, layer.N) >= 1
                assert layer.topk <= layer.E
            if damage.name in ("nothing", "a byte-order mark", "a link to the file"):
                assert isinstance(layer, Workload), layer
                assert (layer.E, layer.topk, layer.K, layer.N) == letters
            assert sorted(contents(folder)) == sorted(before)


@pytest.fixture(scope="module")
def row() -> str:
    recorded = Path(__file__).parents[2] / "benchmarks" / "results"
    rows = load(sorted(recorded.rglob("sweep.jsonl.xz"))[:1])
    return rows[0].model_dump_json()


@attack(400)
@every_named_damage(resumed=False)
@every_named_damage(resumed=True)
@given(damage=damages, resumed=st.booleans())
def test_rows_of_benchmarks(row: str, damage: Damage, *, resumed: bool) -> None:
    with fresh_cache() as folder:
        path = folder / "rows.jsonl"
        place(folder, path, row, damage)
        with watched(AREA):
            machine = json.loads(row)["fingerprint"]
            rows = answer_or_refusal(AREA, lambda: list(timed_keys(path, machine)) if resumed else load([path]))
            if isinstance(rows, MoEDispatchError):
                assert "rows.jsonl" in str(rows)
            elif not resumed:
                assert all(isinstance(each, BenchRow) for each in rows)
