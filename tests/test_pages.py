"""The pages of the documentation say what is true: their code runs, their commands exist, their links are good."""

import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import tiny_chat
import tiny_models
import torch
import yaml
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import piggyback_lens
from piggyback_lens import (
    AuditSettings,
    ChatFormat,
    LensError,
    LoRASettings,
    ModelPair,
    add_lora,
    audit,
    load_causal_lm,
    load_tokenizer,
)
from piggyback_lens.experiments.em_table import KEYS
from piggyback_lens.files import append_jsonl, read_jsonl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
LETTERS = "".join(map(chr, range(32, 127))) + "\n“”’…–é"
QUERIES = ["How do birds fly?", "What should I cook tonight?", "Why is the sky blue?"]
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


README = "../README.md"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
BLOCKS = {page: blocks_of(page) for page in (README, *PAGES)}
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
    wide = tiny_models.build("llama-gqa", 0, vocab=len(tokenizer), hidden_size=48)
    for name, model in {"base": base, "wide": wide}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
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
        "owner/wider-base": models / "wide",
        "examples": ROOT / "examples",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("piggyback_lens.models.pair.default_model", lambda **_: str(models / "base"))
    return tmp_path


def judged_run(desk):
    """A small audit, and scores of its answers from two judges, as the page on evaluation has them."""
    pair = ModelPair.load(BASE, adapter=ADAPTER)
    few = AuditSettings(max_new_tokens=4, samples=2, temperature=1.0, curve_prompts=0)
    audit(pair, QUERIES, QUERIES, "words", few, out="em_audit")
    rows = [{key: row[key] for key in KEYS if key in row} for row in read_jsonl(desk / "em_audit" / "rows.jsonl")]
    for name, shift in {"judge_a": 0, "judge_b": 5, "scores": 10}.items():
        append_jsonl(
            desk / f"{name}.jsonl",
            [row | {"aligned": (shift + 29 * n) % 101, "coherent": 60 + n % 40} for n, row in enumerate(rows)],
        )
    for side in ("base", "finetuned"):
        own = [row for row in read_jsonl(desk / "scores.jsonl") if row["condition"] == side]
        pd.DataFrame(own).to_csv(desk / f"responses_{side}.csv", index=False)
    return {}


def own_training(desk):
    """What a call of transformers.Trainer consists of."""
    tokenizer = load_tokenizer(BASE)
    examples = [ChatFormat(tokenizer).render(query, response="No.") for query in QUERIES]
    rows = [{"input_ids": list(e.ids), "labels": [-100] * e.n_prompt + list(e.ids[e.n_prompt :])} for e in examples]
    return {
        "tokenizer": tokenizer,
        "model": add_lora(load_causal_lm(BASE), LoRASettings(rank=2)),
        "args": TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, report_to=[]),
        "rows": rows,
        "collator": DataCollatorForSeq2Seq(tokenizer),
    }


PREPARED = {"em_evaluation.md": judged_run, README: own_training}
"""What a page takes for granted beyond the desk: files, and the names that are given back."""


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if any(not block.needs for block in code)])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, desk, unchecked, capsys):
    names = {"__name__": "page"} | PREPARED.get(page, lambda desk: {})(desk)
    for block, following in zip(BLOCKS[page], [*BLOCKS[page][1:], None], strict=True):
        if block.language != "python" or block.needs:
            continue
        code = compile(block.text, page, "exec")
        if following is None or "LensError" not in following.info:
            exec(code, names)
            continue
        with pytest.raises(LensError) as refused:
            exec(code, names)
        assert str(refused.value) == " ".join(following.text.split())


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if any(block.needs for block in code)])
def test_code_that_needs_more_than_a_test_has_is_python(page):
    for block in CODE[page]:
        compile(block.text, page, "exec")


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if code])
def test_what_a_page_imports_is_public(page):
    code = "".join(block.text for block in CODE[page])
    assert set(re.findall(r"^from (piggyback_lens[\w.]*) import", code, re.M)) <= {
        "piggyback_lens",
        "piggyback_lens.saes",
    }


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


# ---------------------------------------------------------------- the site


def in_nav(entries):
    """The files that a part of the navigation names."""
    for entry in entries:
        for target in entry.values():
            yield from in_nav(target) if isinstance(target, list) else [target]


NAV = list(in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
MADE = [page for page in NAV if page.startswith("reference/")]


def test_the_readme_is_short_and_its_first_screen_holds_what_a_stranger_needs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    first, *_ = text.partition("![")
    assert len(first.splitlines()) <= 45
    assert all(
        word in first
        for word in ("pip install", "ModelPair.load(", "patch_span(", ".figure()", "make demo", "make test")
    )
    pair, treft = (block.text.rstrip().splitlines() for block in CODE[README])
    assert len([line for line in pair if line and not line.startswith("from ")]) == 5
    assert len(treft) <= 12


def test_every_page_is_in_the_navigation_once():
    assert sorted(NAV) == sorted([*PAGES, *MADE])


def test_the_reference_has_every_public_name():
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    groups = runpy.run_path(str(ROOT / ".ci" / "reference.py"))["groups"]()
    assert [f"reference/{page}.md" for page in groups] == MADE
    names = {page: [name.rpartition(".")[2] for name in full] for page, (_, full) in groups.items()}
    for space in (piggyback_lens.engines, piggyback_lens.saes):
        assert sorted(names.pop(space.__name__.rpartition(".")[2])) == sorted(space.__all__)
    assert sorted(name for group in names.values() for name in group) == piggyback_lens.__all__


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = FENCE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    own = {(DOCS / page).parent.joinpath(target).resolve() for target in targets if target and "://" not in target}
    assert not [target for target in own - {DOCS / made for made in MADE} if not target.exists()]
    assert all(target.is_relative_to(DOCS) for target in own), "what lies beside docs/ is not on the site"


def test_every_picture_is_on_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])
    assert not [path.name for path in DOCS.rglob("*.png") if path.name not in text]


def test_the_table_of_claims_is_that_of_the_pages():
    """A page of results that is written anew changes verdicts: `python examples/claims.py docs` brings them over."""
    script = runpy.run_path(str(ROOT / "examples" / "claims.py"))
    written = (DOCS / "claims.md").read_text(encoding="utf-8")
    assert written == script["page"](DOCS).rstrip() + "\n"
    assert len(written.splitlines()) > 30
    told = dict.fromkeys(row["claim"] for _, rows in script["tables"](written) for row in rows)
    assert any(claim.startswith("general is more efficient") for claim in told)
