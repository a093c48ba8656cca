"""Rows and their files."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pydantic
import pytest

from moe_dispatch.benchmarks import packed, row_files
from moe_dispatch.benchmarks.rows import BenchRow
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.system.compression import compressed
from tests.benchmarks.helpers import RESULTS, bench_row


def test_a_row_has_a_time_or_a_reason() -> None:
    row = bench_row("vllm", "deepseek-v3", "bf16", 1, 2.0)
    for change in ({"us": None}, {"reason": "wrong"}):
        with pytest.raises(pydantic.ValidationError, match="a time or a reason"):
            BenchRow.model_validate(row.model_dump() | change)


def test_recorded_files_are_read_and_other_records_beside_them_passed_over() -> None:
    assert (RESULTS / "options.jsonl.xz").exists()
    rows = row_files.load([RESULTS])
    assert {row.key for row in rows} == {
        row.key
        for name in ("bench", "mxfp4", "sweep", "routings")
        for row in row_files.load([RESULTS / f"{name}.jsonl.xz"])
    }
    assert {row.roofline_from for row in rows} == {"device"}
    assert all(row.fraction == pytest.approx(row.roofline_us / row.us) for row in rows if row.roofline_us and row.us)
    assert len({row.workload for row in rows}) == 7


def test_another_record_is_refused_where_it_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"options.jsonl.xz:1 is not a benchmark row"):
        row_files.load([RESULTS / "options.jsonl.xz"])


def test_a_half_written_line_spoils_no_other(path: Path) -> None:
    first, second = (bench_row("vllm", "deepseek-v3", "bf16", M, 200.0) for M in (1, 4))
    row_files.append(path, first)
    with path.open("ab") as file:
        file.write('{"workload": "é'.encode()[:-1])  # within a letter
    row_files.append(path, second)
    assert row_files.load([path]) == [first, second]


def test_a_full_disk_is_one_message() -> None:
    with pytest.raises(InvalidInputError, match=r"a row cannot be written to /dev/full \(No space left on device\)"):
        row_files.append(Path("/dev/full"), bench_row("vllm", "deepseek-v3", "bf16", 1, 2.0))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"packed":' + "[" * 100_000], ids=["in a folder", "packed"])
def test_what_is_nested_too_deeply_is_one_message(content: str, path: Path) -> None:
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"rows\.jsonl"):
        row_files.load([path.parent])


@pytest.mark.parametrize(
    "line",
    ['{"workload": "x"}', "workload,M,us", '{"workload": "x",,', "[1]", '{"workload": "x", "roofline_from": []}'],
)
def test_a_foreign_line_is_refused(line: str, path: Path) -> None:
    path.write_text(f"{line}\n")
    with pytest.raises(InvalidInputError, match=r"rows.jsonl:1 is not a benchmark row"):
        row_files.load([path])


def test_a_folder_that_goes_away_while_it_is_read_has_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = bench_row("triton_splitk", "mixtral-8x7b", "bf16", 1, 5.0)
    row_files.append(tmp_path / "rows.jsonl", row)
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def racing(path: Path | str) -> Any:
        if Path(path).name == "gone":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert row_files.load([tmp_path]) == [row]


def test_packed_rows_are_the_rows(tmp_path: Path) -> None:
    written = [
        bench_row("triton_splitk", "qwen3-30b-a3b", "bf16", 1, 31.9, config={"block_n": 64}),
        bench_row("triton_splitk", "qwen3-30b-a3b", "bf16", 1, None, config={"block_n": 128}),
        bench_row("triton_splitk", "qwen3-30b-a3b", "bf16", 64, 306.625, config={"block_n": 64}),
        bench_row("vllm", "qwen3-30b-a3b", "fp8", 64, 175.0).model_copy(update={"us_q1": 99.987, "us_q3": 175.26}),
    ]
    path = tmp_path / "packed.jsonl"
    path.write_text(packed.pack(written), encoding="utf-8")
    content = json.loads(path.read_text())
    assert [len(content[name]) for name in ("runs", "configs")] == [1, 3]
    assert content["points"]["rows"] == [2, 1, 1]
    by_key = {row.key: row for row in row_files.load([path])}
    assert set(by_key) == {row.key for row in written}
    rounded = {"us", "us_q1", "us_q3", "fraction", "roofline_us", "hit_experts"}
    for row in written:
        for name in rounded:
            value = getattr(row, name)
            assert getattr(by_key[row.key], name) == (pytest.approx(value, rel=1e-4) if value else value)
        assert by_key[row.key].model_dump(exclude=rounded) == row.model_dump(exclude=rounded)


def test_a_row_without_a_roofline_has_no_fraction_after_packing(tmp_path: Path) -> None:
    row = bench_row("vllm", "qwen3-30b-a3b", "fp8", 64, 175.0)
    none = dict.fromkeys(("roofline_us", "roofline_from", "ceilings", "fraction"))
    row = row.model_copy(update={**none, "hit_experts": 126.0})
    path = tmp_path / "packed.jsonl"
    path.write_text(packed.pack([row]), encoding="utf-8")
    assert row_files.load([path]) == [row]


def test_a_damaged_packed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed.jsonl"
    text = packed.pack([bench_row("vllm", "qwen3-30b-a3b", "fp8", 64, 175.0)])
    changes = (
        (text[-9:], ""), ('"packed":4', '"packed":2'), ('"M":[64]', '"M":[0]'), ('"run":[0]', '"run":[1]'),
        ('"rows":[1]', '"rows":[2]'), ('"above":[0]', '"above":["7"]'), ('"us":[17500]', '"us":[Infinity]'),
        ('"us":[17500]', '"us":[]'), ('"us":[17500]', '"us":5'), ('"decimals":[2]', '"decimals":["2"]'),
        ('"configs":[', '"configs":[[],'), ('"points":{', '"points":[],"no points":{'), ("}\n", "}\n{}\n"),
    )  # fmt: skip
    for old, new in changes:
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(InvalidInputError, match="cannot be read"):
            row_files.load([path])


def test_compressed_rows_are_the_rows_and_damaged_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bench_row("vllm", "qwen3-30b-a3b", "fp8", 64, 175.0)
    content = compressed(row.model_dump_json() + "\n")
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(content)
    assert row_files.load([tmp_path]) == row_files.load([path]) == [row]
    for damage in (content[:-9], b"not xz", content[:12] + bytes(8) + content[20:]):
        path.write_bytes(damage)
        with pytest.raises(InvalidInputError, match=r"rows\.jsonl\.xz cannot be read"):
            row_files.load([path])
    path.write_bytes(compressed(" " * 5000))
    monkeypatch.setattr(row_files, "MAX_BYTES", 4999)
    with pytest.raises(InvalidInputError, match="more than 4,999 bytes when decompressed"):
        row_files.load([path])
