"""Files that are whole or absent: atomic writes, JSON, and JSON lines that survive a kill."""

import dataclasses
import errno
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from piggyback_lens.errors import LensError


def atomic_write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 so that ``path`` holds the old content or the new one, never a part."""
    # Half a surrogate pair has no UTF-8; "\\ud800" is readable, and inside JSON it is the right escape.
    return atomic_write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def atomic_write_bytes(path: str | Path, data: bytes) -> Path:
    """Write through a temporary file in the same folder and ``os.replace``; missing folders are made.

    Raises ``LensError`` when the disk is full or the folder not writable; the temporary file is then gone
    and the old content of ``path`` untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _told_as_lens_error(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def ensure_folder(folder: str | Path) -> Path:
    """Make a folder, and prove that it can be written to.

    Raises ``LensError`` that says why not: no space, a read-only disk, a file in its place, links in a circle.
    """
    folder = Path(folder)
    with _told_as_lens_error(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
        probe.touch()
        probe.unlink()
    return folder


def write_json(path: str | Path, obj: Any) -> Path:
    """Write ``obj`` as strict JSON, atomically.

    NaN (a missing number) becomes null, infinities the strings "Infinity" and "-Infinity"; arrays, tensors,
    data classes and paths become lists, objects and strings. Anything else raises ``LensError``.
    """
    return atomic_write_text(path, _dumps(obj, Path(path), indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; ``LensError`` names the file and what is wrong with it."""
    path = Path(path)
    with _told_as_lens_error(path, "read"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LensError(f"{path} is not valid JSON ({error}); restore it or make it again") from error


def append_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append one line for each row and wait until the disk has them, for runs that may be killed.

    Several processes may write into one file: each append is whole, and none is lost. A line which an earlier kill
    cut off is removed first, so that it cannot merge with the new ones. On a full disk the file is cut back to its
    old length and ``LensError`` raised.
    """
    from filelock import FileLock

    path = Path(path)
    data = "".join(_dumps(row, path) + "\n" for row in rows).encode("utf-8", errors="backslashreplace")
    with _told_as_lens_error(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")), path.open("a+b", buffering=0) as file:
            start = _mend(file)
            try:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(start)
                raise
    return path


def _mend(file: IO[bytes]) -> int:
    """End the last line, or cut it off where a kill left a part of it; returns the length."""
    size = file.seek(0, os.SEEK_END)
    back, tail = min(size, 1 << 16), b""
    while True:
        file.seek(size - back)
        tail = file.read(back)
        if b"\n" in tail or back == size:
            break
        back = min(size, back * 4)
    torn = tail.rpartition(b"\n")[2]
    if not torn:
        return size
    # A kill may also take nothing but the line end: then the row is complete and stays.
    if _row_or_none(torn) is not None:
        file.write(b"\n")
    else:
        file.truncate(size - len(torn))
    return file.seek(0, os.SEEK_END)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a JSON lines file, which is left as it is.

    A last line without its end, left by a kill in the middle of a write (or being written), is left out. Any other
    broken line raises ``LensError`` with file and line number.
    """
    path = Path(path)
    with _told_as_lens_error(path, "read"):
        lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row_or_none(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise LensError(f"line {number} of {path} is not a JSON object; remove the line or make the file again")
    return rows


def _row_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # broken JSON, broken UTF-8, brackets without end
        return None
    return row if isinstance(row, dict) else None


def _dumps(obj: Any, path: Path, indent: int | None = None) -> str:
    return json.dumps(_jsonable(obj, path), ensure_ascii=False, allow_nan=False, indent=indent)


def _jsonable(obj: Any, path: Path) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    elif isinstance(obj, Path):
        obj = str(obj)
    elif isinstance(obj, set | frozenset):
        obj = sorted(obj, key=str)
    elif hasattr(obj, "tolist"):  # numpy scalars and arrays, tensors, pandas columns
        obj = obj.tolist()
    if isinstance(obj, Mapping):
        return {str(key): _jsonable(value, path) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_jsonable(value, path) for value in obj]
    if isinstance(obj, float):
        return _number(obj)
    if obj is None or isinstance(obj, str | int):
        return obj
    kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
    raise LensError(f"cannot write an object of type {kind} to {path}; turn it into numbers, text, lists or dicts")


def _number(value: float) -> float | str | None:
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return None if math.isnan(value) else value


_ADVICE = {
    errno.ENOSPC: "free some disk space, then run it again",
    errno.EDQUOT: "free some of your quota, then run it again",
    errno.EROFS: "choose a folder on a disk that may be written to",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "a file lies where a folder belongs, choose another folder",
    errno.EEXIST: "a file lies where a folder belongs, choose another folder",
    errno.EISDIR: "a folder lies where the file belongs, choose another folder",
    errno.ELOOP: "its symbolic links lead in a circle, choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def _told_as_lens_error(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if done == "read":
            raise LensError(f"{path} cannot be read: {why}; check the path") from error
        advice = _ADVICE.get(error.errno or 0, "choose another folder")
        raise LensError(f"{path} cannot be written: {why}; {advice}") from error
