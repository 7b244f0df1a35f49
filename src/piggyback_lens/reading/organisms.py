"""Published organisms: an index of base, finetune and questions, with the place that says so, which users extend.

    found = load_organisms("mine.json")                     # those that are shipped, and yours
    pair = ModelPair.load(**found["em-medical-7b"].sides)

Names of repositories only: no weights are shipped, and nothing is looked up here. An entry says where it was read and
when; whether the repository still holds what it held then is told when it is loaded.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json


@dataclass(frozen=True)
class Organism:
    """One published finetune.

    Attributes:
        name: what it is called in the index.
        base: the model that it was made of, as `ModelPair.load` takes it.
        adapter: its PEFT adapter; or else
        finetuned: the whole finetuned model.
        subfolder: of the repository of either, such as checkpoint-120.
        questions: what `load_questions` reads, of its training domain.
        about: what it was trained on.
        source: address of what says all this.
        quote: the words there that name base and finetune.
        seen: the day on which it was read, or that of the stored copy, as YYYY-MM-DD.
    """

    name: str
    base: str
    source: str
    quote: str
    seen: str
    adapter: str | None = None
    finetuned: str | None = None
    subfolder: str | None = None
    questions: str | None = None
    about: str = ""

    @property
    def sides(self) -> dict[str, str]:
        """The arguments of `ModelPair.load`."""
        kind = "adapter" if self.adapter else "finetuned"
        place = str(self.adapter or self.finetuned)
        return {"base": self.base, kind: f"{place}:{self.subfolder}" if self.subfolder else place}

    def __str__(self) -> str:
        kind, place = list(self.sides.items())[1]
        about = f"{self.about}; " if self.about else ""
        return f"{self.name}: {about}{self.base}, {kind} {place} ({self.seen}, {self.source})"


_TEXT, _NEEDED = (
    ("adapter", "finetuned", "subfolder", "questions", "about"),
    ("name", "base", "source", "quote", "seen"),
)


def load_organisms(path: str | Path | None = None) -> dict[str, Organism]:
    """The organisms that are shipped, and those of a file of your own, by name.

    Args:
        path: a JSON file of the same form, {"organisms": [{"name": ..., "base": ..., "adapter": ..., "source": ...,
            "quote": ..., "seen": "2026-11-28"}]}; adapter and base may be folders.

    Raises:
        LensError: an entry without one of these, with both or none of adapter and finetuned, with other fields, or with
            a name that is taken; it is named.

    Example:
        >>> load_organisms()["em-medical-7b"].sides
        {'base': 'unsloth/Qwen2.5-7B-Instruct', 'adapter': 'ModelOrganismsForEM/Qwen2.5-7B-Instruct_bad-medical-advice'}
    """
    shipped = files("piggyback_lens").joinpath("data", "organisms.json")
    found = _read(json.loads(shipped.read_text(encoding="utf-8")), "the index", {})
    return found if path is None else found | _read(read_json(path), str(path), found)


def _read(data: Any, where: str, taken: Mapping[str, Organism]) -> dict[str, Organism]:
    entries = data.get("organisms") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise LensError(f'{where} has no list "organisms" of entries: see the help of load_organisms')
    found: dict[str, Organism] = {}
    for number, entry in enumerate(entries):
        own = _entry(entry, f"{where}, entry {number}")
        if own.name in taken or own.name in found:
            raise LensError(f"{where}, entry {number}: the name {own.name!r} is taken: choose another")
        found[own.name] = own
    return found


def _entry(entry: Any, where: str) -> Organism:
    if not isinstance(entry, dict):
        raise LensError(f"{where} is no object: expected name, base, adapter or finetuned, source, quote, seen")
    if unknown := [name for name in entry if name not in (*_NEEDED, *_TEXT)]:
        raise LensError(f"{where} has a field {unknown[0]!r}: expected some of {_listed((*_NEEDED, *_TEXT))}")
    if wrong := [name for name, value in entry.items() if value is not None and not isinstance(value, str)]:
        raise LensError(f"{where}: {wrong[0]} is {entry[wrong[0]]!r:.80}, expected text")
    entry = {name: value.strip() or None for name, value in entry.items() if value is not None}
    if missing := [name for name in _NEEDED if not entry.get(name)]:
        raise LensError(f"{where} says no {missing[0]}: every entry needs {_listed(_NEEDED)}")
    if bool(entry.get("adapter")) == bool(entry.get("finetuned")):
        raise LensError(f"{where}: give exactly one of adapter and finetuned")
    place = str(entry.get("adapter") or entry.get("finetuned"))
    if entry.get("subfolder") and ":" in Path(place).name:
        raise LensError(f"{where}: {place} names a folder already, and subfolder is {entry['subfolder']!r}: keep one")
    try:
        known = date.fromisoformat(entry["seen"]).isoformat() == entry["seen"]
    except ValueError:
        known = False
    if not known:
        raise LensError(f"{where}: seen is {entry['seen']!r}, expected a day such as 2026-11-28")
    return Organism(**{name: value for name, value in entry.items() if value is not None})


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
