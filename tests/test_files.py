"""Files are whole or absent, whatever happens while they are written."""

import errno
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from piggyback_lens import files
from piggyback_lens.errors import LensError


@dataclass(frozen=True)
class Sample:
    value: float
    where: Path


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_text_and_bytes_arrive_with_missing_folders_made_and_no_temporary_left(tmp_path):
    path = files.atomic_write_text(tmp_path / "a" / "b" / "note.txt", "naïve → text\n")
    assert path.read_bytes() == "naïve → text\n".encode()
    assert files.atomic_write_bytes(path, b"\x00\n").read_bytes() == b"\x00\n"
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_the_written_file_has_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.write_text("")
    written = files.atomic_write_text(tmp_path / "written", "")
    assert written.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file_no_temporary_one_and_says_what_to_do(tmp_path, monkeypatch, failing):
    path = tmp_path / "result.json"
    files.write_json(path, {"old": 1})
    monkeypatch.setattr(failing, full_disk)
    with pytest.raises(LensError, match=r"result\.json cannot be written: No space left on device; free some disk"):
        files.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_an_interrupt_removes_the_temporary_file_too(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write_text(tmp_path / "a.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_writing_over_a_folder_or_under_a_file_is_told(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(LensError, match="cannot be written"):
            files.atomic_write_text(path, "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_json_is_strict_and_keeps_numbers_text_arrays_and_data_classes(tmp_path):
    obj = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "numpy": np.float32(0.5),
        "count": np.int64(3),
        "array": np.array([[1.0, math.nan]]),
        "tensor": torch.tensor([1, 2]),
        "sample": Sample(2.5, Path("x") / "y"),
        "text": "ü\u2028<|im_start|>\ud800",
        "flag": np.bool_(True),
        3: (None, True),
        "set": {"b", "a"},
    }
    text = files.write_json(tmp_path / "a.json", obj).read_text(encoding="utf-8")

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(text, parse_constant=refuse)
    assert read == files.read_json(tmp_path / "a.json")
    assert read == {
        "nan": None,
        "inf": ["Infinity", "-Infinity"],
        "numpy": 0.5,
        "count": 3,
        "array": [[1.0, None]],
        "tensor": [1, 2],
        "sample": {"value": 2.5, "where": str(Path("x") / "y")},
        "text": "ü\u2028<|im_start|>\ud800",
        "flag": True,
        "3": [None, True],
        "set": ["a", "b"],
    }
    assert "ü" in text


def test_json_of_an_unknown_type_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LensError, match=r"cannot write an object of type builtins\.object to .*a\.json"):
        files.write_json(tmp_path / "a.json", {"x": [object()]})
    assert list(tmp_path.iterdir()) == []


def test_unreadable_json_is_told_with_file_and_reason(tmp_path):
    with pytest.raises(LensError, match=r"none\.json cannot be read: No such file"):
        files.read_json(tmp_path / "none.json")
    for data in (b'{"a": 1', b"", b"\xff\xfe\x00"):
        (tmp_path / "bad.json").write_bytes(data)
        with pytest.raises(LensError, match=r"bad\.json is not valid JSON \("):
            files.read_json(tmp_path / "bad.json")


def test_json_lines_are_appended_and_read_back(tmp_path):
    path = tmp_path / "runs" / "rows.jsonl"
    files.append_jsonl(path, [{"a": 1}, {"b": math.nan}])
    files.append_jsonl(path, [])
    files.append_jsonl(path, [{"text": "two\nlines\u2028and more"}])
    assert files.read_jsonl(path) == [{"a": 1}, {"b": None}, {"text": "two\nlines\u2028and more"}]
    assert path.read_bytes().count(b"\n") == 3


def test_a_file_cut_at_any_byte_reads_as_its_whole_rows_and_can_be_continued(tmp_path):
    rows = [{"i": 0, "text": "eins"}, {"i": 1, "text": "zwölf → {\\"}, {"i": 2}]
    path = files.append_jsonl(tmp_path / "rows.jsonl", rows)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(cut >= end for end in ends)  # a row is whole without its line end, too
        assert files.read_jsonl(path) == rows[:whole]
        assert path.read_bytes() == data[:cut]  # reading changes nothing: somebody may be writing
        files.append_jsonl(path, [{"i": 9}])
        assert files.read_jsonl(path) == [*rows[:whole], {"i": 9}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    for middle in ("{broken", "[1]"):
        path.write_text(f'{{"a": 1}}\n{middle}\n{{"b": 2}}\n', encoding="utf-8")
        with pytest.raises(LensError, match=r"line 2 of .*rows\.jsonl"):
            files.read_jsonl(path)
    with pytest.raises(LensError, match="cannot be read"):
        files.read_jsonl(tmp_path / "none.jsonl")


def test_appending_on_a_full_disk_leaves_the_rows_that_were_there(tmp_path, monkeypatch):
    path = files.append_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(LensError, match=r"rows\.jsonl cannot be written: No space left"):
        files.append_jsonl(path, [{"b": 2}])
    monkeypatch.undo()
    assert files.read_jsonl(path) == [{"a": 1}]
