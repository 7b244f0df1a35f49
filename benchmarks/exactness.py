"""How exact is a hooked model? Layouts and adapters on tiny models, both backends, against transformers and PEFT.

    python benchmarks/exactness.py --json out/pinned.json
    python benchmarks/exactness.py --page docs/layouts.md out/*.json

The first prints and keeps the figures of the installed versions; the second writes the page from one or more of them.
An error is the largest difference of a logit, as a fraction of the largest logit.
"""

import argparse
import json
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny_adapters
import tiny_chat
import tiny_models
from tiny_hooked import BACKENDS

from piggyback_lens import LensError, ModelPair, hook_model
from piggyback_lens.models import proof
from piggyback_lens.models.network import forward

IDS = torch.tensor([[1, 7, 8, 9, 20, 21, 5, 4, 3, 30]])
PACKAGES = ("torch", "transformers", "transformer-lens", "peft")


def error(pair: ModelPair, side: str, expected: torch.Tensor) -> float:
    with pair.using(side) as model, torch.no_grad():
        found = forward(model, IDS, torch.ones_like(IDS))
    return float((found - expected).abs().max() / expected.abs().max())


def layout(name: str, backend: str) -> str:
    """The largest relative difference over all passes of the proof at load, or why there is none."""
    model = tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    try:
        hooked = hook_model(model, None, backend=backend)
    except LensError:
        return "refused"
    with torch.no_grad():
        return short(max(d for _, d in proof.passes(hooked, proof.Expected.of(model, name))))


def short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def adapter(kind: str, backend: str) -> str:
    base, wrapped = tiny_adapters.build(kind)
    with torch.no_grad():
        plain, adapted = base(input_ids=IDS).logits, wrapped(input_ids=IDS).logits
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        try:
            pair = ModelPair.load(base, adapter=folder, tokenizer=tiny_chat.tiny_tokenizer(), backend=backend)
        except LensError:
            return "refused"
        return f"{short(error(pair, 'base', plain))}, {short(error(pair, 'finetuned', adapted))}"


def refused(kind: str) -> str:
    config, _ = tiny_adapters.REFUSED[kind]
    wrapped = tiny_adapters.put_on(tiny_models.build("llama-mha", 0, vocab=tiny_chat.VOCAB), config())
    try:
        ModelPair.load(finetuned=wrapped, tokenizer=tiny_chat.tiny_tokenizer())
    except LensError:
        return "refused by name"
    return "accepted"


def measure() -> dict[str, Any]:
    layouts = {n: {b: layout(n, b) for b in BACKENDS} for n in (*tiny_models.NAMES, *tiny_models.MORE)}
    adapters = {kind: {b: adapter(kind, b) for b in BACKENDS} for kind in tiny_adapters.KINDS}
    adapters |= {kind: dict.fromkeys(BACKENDS, refused(kind)) for kind in tiny_adapters.REFUSED}
    return {"versions": {name: installed(name) for name in PACKAGES}, "layouts": layouts, "adapters": adapters}


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def table(rows: dict[str, dict[str, str]], columns: list[str], corner: str) -> list[str]:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in rows.items()]


def page(runs: dict[str, dict[str, Any]]) -> str:
    """Every layout under every run's versions, and the adapters of the first run that has both backends."""
    legs = {name: ", ".join(f"{p} {run['versions'][p]}" for p in PACKAGES) for name, run in runs.items()}
    both = next((run for run in runs.values() if any("hooked" in row for row in run["layouts"].values())), None)
    columns = [f"{leg}, {b}" for leg, run in runs.items() for b in next(iter(run["layouts"].values()))]
    layouts: dict[str, dict[str, str]] = {}
    for leg, run in runs.items():
        for name, row in run["layouts"].items():
            layouts.setdefault(name, {}).update({f"{leg}, {b}": value for b, value in row.items()})
    first = both or next(iter(runs.values()))
    lines = [
        "# Layouts and adapters",
        "",
        "Written by `python benchmarks/exactness.py --json out/NAME.json` in each environment, then",
        "`python benchmarks/exactness.py --page docs/layouts.md out/*.json`. Each row is a tiny random model.",
        "",
        "## Layouts",
        "",
        "The largest relative difference of a token's logits from transformers' own pass: rows padded left and right,",
        "a pass on a filled cache, one decoding step. The same layouts have the tests of `tests/test_exactness.py`:",
        "patches by hooks, by prefix cache, and token by token without any cache. *refused*: HookedTransformer lacks",
        "the layout or gets it wrong, and the library says so. gemma3-vision is multimodal Gemma 3, used through its",
        "text model.",
        "",
        *table(layouts, columns, "layout"),
        "",
        *[f"- {leg}: {versions}" for leg, versions in legs.items()],
        "",
        "## Adapters",
        "",
        "Error of the base side, error of the finetuned side, against PEFT's own passes (base: before the adapter was",
        "attached), as a fraction of the largest logit. llama-bias, on which `bias=` is tested, is refused by",
        "HookedTransformer itself. A whole model beside its base takes any adapter that PEFT can merge.",
        "",
        *table(first["adapters"], list(next(iter(first["adapters"].values()))), "adapter"),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures of the installed versions here")
    parser.add_argument("--page", type=Path, help="write the page here, from the files given")
    parser.add_argument("runs", nargs="*", type=Path)
    options = parser.parse_args()
    if options.page:
        options.page.write_text(page({file.stem: json.loads(file.read_text()) for file in options.runs}))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = measure()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))
    print("\n".join(table(found["layouts"], list(BACKENDS), "layout")))
    print("\n".join(table(found["adapters"], list(BACKENDS), "adapter: base, finetuned")))


if __name__ == "__main__":
    main()
