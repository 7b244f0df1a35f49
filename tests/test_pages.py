"""The pages of the documentation say what is true: their code runs, their commands exist, their links lead somewhere."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_chat
import tiny_models
import torch

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.settings import LoRASettings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
LETTERS = "".join(map(chr, range(32, 127))) + "\n“”’…–é"
BASE, ADAPTER = "Qwen/Qwen2.5-7B-Instruct", "my-finetune"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `needs` is what its title says that it needs, and a test does not have."""

    page: str
    language: str
    info: str
    text: str

    @property
    def needs(self):
        return re.findall(r'title="needs ([^"]*)"', self.info)


def blocks_of(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    found = FENCE.findall(text)
    assert text.count("```") == 2 * len(found), f"{page} has a fence that is not closed"
    return [Block(page, language, info, body) for _, language, info, body in found]


PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
BLOCKS = {page: blocks_of(page) for page in PAGES}
CODE = {page: [block for block in found if block.language == "python"] for page, found in BLOCKS.items()}


def commands():
    """Every line of a shell block that calls piggyback-lens, continued lines joined."""
    for page, found in BLOCKS.items():
        for block in found:
            if block.language == "sh":
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.startswith("piggyback-lens "):
                        yield page, line


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base whose tokenizer knows every letter of the pages, and a finetune of it that answers differently."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_chat.tiny_tokenizer(letters=LETTERS)
    base = tiny_models.build("llama-gqa", 0, vocab=len(tokenizer), max_position_embeddings=2048)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tuned = add_lora(base, LoRASettings(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(root / "adapter", save_embedding_layers=False)
    return root


@pytest.fixture
def desk(models, tmp_path, monkeypatch):
    """A folder as the pages take it for granted: a base, a finetune, the demo's output, and the files of a clone."""
    for name, target in {
        BASE: models / "base",
        ADAPTER: models / "adapter",
        "demo_out/organism/adapter": models / "adapter",
        "examples": ROOT / "examples",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("piggyback_lens.models.pair.default_model", lambda **_: str(models / "base"))
    return tmp_path


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if any(not block.needs for block in code)])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, desk, unchecked, capsys):
    names = {"__name__": "page"}
    for block in CODE[page]:
        if not block.needs:
            exec(compile(block.text, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if any(block.needs for block in code)])
def test_code_that_needs_more_than_a_test_has_is_python(page):
    for block in CODE[page]:
        compile(block.text, page, "exec")


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if code])
def test_what_a_page_imports_is_public(page):
    code = "".join(block.text for block in CODE[page])
    assert set(re.findall(r"^from (piggyback_lens[\w.]*) import", code, re.M)) <= {"piggyback_lens", "piggyback_lens.saes"}


def test_the_commands_of_the_pages_exist_with_these_options():
    from typer.main import get_command

    from piggyback_lens.app.commands import app

    known, used = get_command(app).commands, set()
    for page, line in commands():
        _, name, *arguments = shlex.split(line, comments=True)
        used.add(name)
        context = known[name].make_context(name, arguments, resilient_parsing=False)
        assert not context.args, f"{page}: {line}"
    assert used == set(known)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = FENCE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    own = [target for target in targets if target and "://" not in target]
    made = {f"reference/{name}.md" for name in ("models", "values", "measuring", "experiments", "directions", "training", "saes")}
    there = {str((DOCS / page).parent.joinpath(target).resolve().relative_to(DOCS)) for target in own}
    assert not [target for target in there - made if not (DOCS / target).exists()]
