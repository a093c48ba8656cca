"""Calibrations that are carried to other machines: the search path, and the commands that write and merge files."""

import json
import lzma
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dispatch.commands.app import app
from moe_dispatch.errors import InvalidInputError, MoEDispatchWarning
from moe_dispatch.policies.calibrated import CalibratedPolicy, calibration_path, calibration_paths
from moe_dispatch.policies.measurements.merge import save
from moe_dispatch.policies.measurements.schema import Measurement, read_calibration
from moe_dispatch.workloads import Workload
from tests.policies.test_policy_files import LAYER, MACHINE, measured
from tests.support.fakes import Honest, registered

OTHER_LAYER = Workload("other", E=4, topk=2, K=64, N=32)


@pytest.fixture
def own() -> Path:
    """The path of this machine's own calibration, in an empty cache."""
    return calibration_path(MACHINE)


def shared(folder: Path, monkeypatch: pytest.MonkeyPatch, *measurements: Measurement) -> Path:
    """A folder on the search path, with a calibration of this machine."""
    path = folder / f"{MACHINE.fingerprint}.json"
    save(path, measurements, MACHINE)
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", str(folder))
    return path


def ranked(layer: Workload = LAYER, M: int = 1) -> list[str]:
    return [choice.backend for choice in CalibratedPolicy(MACHINE).rank(layer.problem(M, "fp32", MACHINE))]


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["calibration", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def refusal(*arguments: str | Path) -> str:
    return " ".join(run(*arguments, status=2).split())


def test_a_folder_on_the_search_path_is_read(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranked() == []
    path = shared(tmp_path / "fleet", monkeypatch, measured(1, 5.0))
    content = path.read_bytes()
    path.chmod(0o444)
    assert ranked() == ["reference"]
    assert path.read_bytes() == content
    assert not own.exists()
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", f"/nowhere:{path}")
    assert ranked() == ["reference"]
    compressed = tmp_path / "any-name.json.xz"
    compressed.write_bytes(lzma.compress(content))
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", str(compressed))
    assert ranked() == ["reference"]


def test_a_layer_is_ranked_by_the_first_file_that_has_it(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registered(Honest):
        shared(tmp_path, monkeypatch, measured(1, 1.0, Honest.name), measured(1, 1.0, Honest.name, layer=OTHER_LAYER))
        save(own, [measured(1, 9.0)], MACHINE)
        assert ranked() == ["reference"]
        assert ranked(OTHER_LAYER) == [Honest.name]
        # What is retired does not stand in the way of the next file.
        save(own, [measured(1, 9.0, versions={"torch": "1.0"})], MACHINE)
        assert ranked() == [Honest.name]


def test_the_mode_counts_more_than_the_file(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(Honest):
        shared(tmp_path, monkeypatch, measured(1, 1.0, Honest.name))
        save(own, [measured(1, 9.0, mode="graph")], MACHINE)
        assert ranked() == [Honest.name]


def test_a_damaged_file_on_the_search_path_is_refused_and_the_others_count(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(own, [measured(1, 9.0)], MACHINE)
    shared(tmp_path, monkeypatch, measured(1, 5.0)).write_text("{", encoding="utf-8")
    with pytest.warns(MoEDispatchWarning, match="is damaged"):
        policy = CalibratedPolicy(MACHINE)
    assert policy.rank(LAYER.problem(1, "fp32", MACHINE))
    assert any("refused" in note for note in policy.notes())


def test_a_relative_entry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", "/a:b/c")
    with pytest.raises(InvalidInputError, match="MOE_DISPATCH_CALIBRATION_PATH must be an absolute path, got 'b/c'"):
        calibration_paths(MACHINE)


def test_show(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no calibration" in run("show", "--device", "cpu")
    for entry in ("/dev/null", f"/{'a' * 300}"):  # of which nothing can be read, as of a folder of another user
        monkeypatch.setenv("MOE_DISPATCH_CALIBRATION_PATH", entry)
        assert "cannot be read" in refusal("show", "--device", "cpu")
    path = shared(tmp_path, monkeypatch, measured(1, 5.0), measured(4, 7.0))
    save(own, [measured(2, 9.0)], MACHINE)
    output = run("show", "--device", "cpu")
    unwrapped = "".join(output.split())  # a terminal of 80 columns wraps long paths
    assert unwrapped.index(str(own)) < unwrapped.index(str(path))
    assert "2 from 1 to 4" in output
    (described,) = json.loads(run("show", path, "--json"))
    assert (described["path"], described["fingerprint"]) == (str(path), MACHINE.fingerprint)
    assert described["layers"][0]["tokens"] == [1, 4]
    assert f"{tmp_path / 'absent'} does not exist" in refusal("show", tmp_path / "absent")


def test_export_and_import_carry_a_calibration(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no calibration of its own" in refusal("export", tmp_path, "--device", "cpu")
    save(own, [measured(1, 5.0)], MACHINE)
    assert "1 point of" in run("export", tmp_path, "--device", "cpu")
    exported = tmp_path / f"{MACHINE.fingerprint}.json"
    monkeypatch.setenv("MOE_DISPATCH_CACHE_DIR", str(tmp_path / "another"))
    save(calibration_path(MACHINE), [measured(1, 6.0), measured(2, 8.0)], MACHINE)
    run("import", exported, "--device", "cpu")
    merged = read_calibration(calibration_path(MACHINE), MACHINE)
    assert {measurement.M: measurement.score for measurement in merged.measurements()} == {1: 5.0, 2: 8.0}
    assert all(measurement.incumbent for measurement in merged.measurements())


def foreign(path: Path) -> Path:
    """A calibration of another machine."""
    save(path, [measured(1, 5.0)], MACHINE.model_copy(update={"name": "another CPU"}))
    return path


def test_import_refuses_another_machines_and_changes_nothing(own: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    save(good, [measured(1, 5.0)], MACHINE)
    assert "was measured on 'another CPU'" in refusal("import", good, foreign(tmp_path / "a.json"), "--device", "cpu")
    assert not own.exists()


def test_merge(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    save(files[0], [measured(1, 5.0), measured(2, 6.0)], MACHINE)
    save(files[1], [measured(2, 7.0), measured(1, 2.0, layer=OTHER_LAYER)], MACHINE)
    out = tmp_path / "out.json"
    assert "3 points of" in run("merge", *files, "--out", out)
    scores = {(m.layer.E, m.M): m.score for m in read_calibration(out, MACHINE).measurements()}
    assert scores == {(8, 1): 5.0, (8, 2): 7.0, (4, 1): 2.0}
    message = refusal("merge", files[0], foreign(tmp_path / "c.json"), "--out", out)
    assert "merge calibrations of the same hardware" in message
    assert "cannot be written" in refusal("merge", files[0], "--out", files[1] / "below")
