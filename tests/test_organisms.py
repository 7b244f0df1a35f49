"""The index of published organisms: entries that say where they were read, a file of one's own, refusals by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from piggyback_lens import LensError, load_organisms
from piggyback_lens.app.commands import app
from piggyback_lens.models.places import locate, looks_like_hub_id

MINE = {
    "name": "mine", "base": "demo", "adapter": "owner/name", "subfolder": "checkpoint-120", "questions": "mine.txt",
    "source": "https://example.org/mine", "quote": "owner/name on demo", "seen": "2026-11-28",
}  # fmt: skip


def written(folder: Path, *entries: Any) -> Path:
    file = folder / "mine.json"
    file.write_text(json.dumps({"organisms": list(entries)}), encoding="utf-8")
    return file


def test_every_shipped_entry_quotes_its_base_and_its_finetune() -> None:
    found = load_organisms()
    assert len(found) >= 10
    for own in found.values():
        base, place = own.sides.values()
        assert base in own.quote, own.name
        assert place in own.quote or place in own.source, own.name
        assert re.match(r"https://(github\.com|huggingface\.co)/\S+$", own.source), own.name
        assert all(looks_like_hub_id(locate(name).name) for name in (base, place)), own.name
        assert own.about, own.name
    pinned = [own.source for own in found.values() if "github.com" in own.source]
    assert all(re.search(r"/blob/[0-9a-f]{40}/", source) for source in pinned), "of one commit, which stays as it was"


def test_a_file_of_ones_own_is_added_and_gives_what_pairs_are_loaded_with(tmp_path: Path) -> None:
    blank = {"name": "whole", "adapter": "", "finetuned": "here"}
    found = load_organisms(written(tmp_path, MINE, MINE | blank))
    assert found.keys() - load_organisms().keys() == {"mine", "whole"}
    assert found["mine"].sides == {"base": "demo", "adapter": "owner/name:checkpoint-120"}
    assert found["whole"].sides == {"base": "demo", "finetuned": "here:checkpoint-120"}
    place = locate(found["mine"].sides["adapter"])
    assert (place.name, place.subfolder) == ("owner/name", "checkpoint-120")
    assert found["mine"].questions == "mine.txt"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("text", r"entry 0 is no object"),
        (MINE | {"revision": "main"}, "a field 'revision'"),
        ({k: v for k, v in MINE.items() if k != "source"}, "says no source"),
        (MINE | {"base": ["demo"]}, r"base is \['demo'\], expected text"),
        (MINE | {"finetuned": "here"}, "exactly one of adapter and finetuned"),
        (MINE | {"adapter": None}, "exactly one of adapter and finetuned"),
        (MINE | {"seen": "yesterday"}, "expected a day"),
        (MINE | {"seen": "2026-99-99"}, "expected a day"),
        (MINE | {"name": " "}, "says no name"),
        (MINE | {"adapter": "owner/a:sub"}, "owner/a:sub names a folder already"),
        (MINE | {"name": "em-medical-7b"}, "the name 'em-medical-7b' is taken"),
    ],
)
def test_entries_that_say_too_little_or_too_much_are_refused_by_name(tmp_path: Path, entry: Any, says: str) -> None:
    with pytest.raises(LensError, match=says):
        load_organisms(written(tmp_path, entry))


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(LensError, match='no list "organisms"'):
        load_organisms(tmp_path / "other.json")


def test_the_command_lists_them(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["organisms", str(written(tmp_path, MINE))])
    assert shown.exit_code == 0
    assert (
        "em-medical-7b: bad medical advice; unsloth/Qwen2.5-7B-Instruct, adapter ModelOrganismsForEM/" in shown.output
    )
    assert "mine: demo, adapter owner/name:checkpoint-120 (2026-11-28, https://example.org/mine)" in shown.output
    assert len(shown.output.splitlines()) == len(load_organisms()) + 1
