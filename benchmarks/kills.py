"""Kill experiments while they run, let the same call go on, and compare with runs that nobody disturbed.

    python benchmarks/kills.py [--kills 20] [--only audit training] [--page docs/reliability.md]

On the tests' tiny models. Each trial begins a fresh folder in a child process, kills it (SIGKILL) at a random moment of
the time that an undisturbed run takes, and calls again. Prints a Markdown table, and writes it as a page with `--page`.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_chat
import tiny_models
from tiny_hooked import chat, prompts
from tiny_pairs import pair

from piggyback_lens import (
    AuditSettings,
    CompareSettings,
    CurveSettings,
    Direction,
    LoRASettings,
    MapSettings,
    PatchSettings,
    PerturbSettings,
    SoftPatchSettings,
    SteerSettings,
    StressSettings,
    Task,
    TrainDirectionSettings,
    TrainSettings,
    add_lora,
    attribution_map,
    audit,
    carrier_map,
    compare_methods,
    edge_map,
    hook_model,
    layer_curve,
    layer_position_map,
    patch_span,
    perturb,
    soft_patch,
    steer,
    stress,
    train,
)
from piggyback_lens.app.curve_job import draw_curves
from piggyback_lens.app.direction_training import train_direction
from piggyback_lens.app.maps import run_maps
from piggyback_lens.vectors.direction import Provenance

QUERIES = ["one", "two words", "a longer question?", "four", "and five", "six here"]
TRAINING = TrainSettings(steps=24, batch_size=4, learning_rate=1e-2, checkpoint_every=4)
VOLATILE = {"seconds", "card", "machine", "peak_memory_gb", "resumed_from"}
"""What is another in every call."""


def tiny(seed=0):
    return tiny_models.build("llama-gqa", seed, vocab=tiny_chat.VOCAB)


def tiny_source():
    return tiny(), tiny_chat.tiny_tokenizer()


def trained(out):
    train(add_lora(tiny(), LoRASettings(rank=2)), tiny_chat.tiny_examples(12), TRAINING, out=out, progress=False)


def direction():
    return Direction(torch.arange(32.0)[None] / 32, (1,), "resid_post", "positive: x", Provenance("by hand"))


def narrow(out):
    training = {"steps": 24, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 4}
    settings = TrainDirectionSettings(layers=(1,), retain_batch=3, answer_tokens=4, shown=1, kl=1.0, **training)
    model = hook_model(tiny(), tiny_chat.tiny_tokenizer())
    train_direction(model, tiny_chat.tiny_examples(8), settings, retain=prompts(QUERIES), out=out, progress=False)


def compared(out):
    example = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes yes"}]}
    words = tuple(QUERIES)
    task = Task("tiny", "", "words", (example,) * 8, (example,) * 2, words, words, words)
    settings = CompareSettings(
        seeds=(0,),
        n_prompts=4,
        max_new_tokens=4,
        n_texts=2,
        training=TrainSettings(steps=6, batch_size=4, checkpoint_every=2),
        lora=LoRASettings(rank=2),
    )
    compare_methods(tiny_source, task, ["sft", "treft:lambda=1"], settings, out=out, progress=False)


@cache
def base_model():
    return hook_model(tiny(), tiny_chat.tiny_tokenizer())


def perturbed(out):
    perturb(
        pair(), prompts(QUERIES), "words", settings=PerturbSettings(trials=3, max_new_tokens=4, batch_size=4), out=out
    )


def stressed(out):
    stress(
        pair(), prompts(QUERIES), "words", chat=chat(), settings=StressSettings(max_new_tokens=4, batch_size=4), out=out
    )


def audited(out):
    sizes = {"max_new_tokens": 5, "batch_size": 2, "curve_prompts": 3, "curve_tokens": 2, "control_layers": 1}
    audit(pair(), QUERIES[:3], QUERIES, "words", chat=chat(), out=out, settings=AuditSettings(**sizes))


def drawn(out):
    settings, examples = CurveSettings(fractions=(0.0, 1.0), epsilons=(0.0, 0.5)), tiny_chat.tiny_examples(6)
    draw_curves(base_model(), {"a": direction()}, examples, [], ("efficiency", "stability"), settings, out=out)


def steered(out):
    settings = SteerSettings(strengths=(1.0, 2.0), layers=(0, 1, 2), max_new_tokens=4)
    steer(base_model(), direction(), prompts(QUERIES), "words", settings, out=out)


def mapped(out):
    run_maps(pair(), prompts(QUERIES), MapSettings(("layers", "span"), answer_tokens=3), out=out, progress=False)


EXPERIMENTS = {
    "patch_span": lambda out: patch_span(pair(), prompts(QUERIES), out=out, settings=PatchSettings(budget_gb=1e-9)),
    "layer_curve": lambda out: layer_curve(pair(), prompts(QUERIES), out=out, settings=PatchSettings(budget_gb=1e-9)),
    "layer_position_map": lambda out: layer_position_map(
        pair(), prompts(QUERIES), out=out, settings=PatchSettings(budget_gb=1e-4)
    ),
    "carrier_map": lambda out: carrier_map(pair(), prompts(QUERIES), out=out, settings=PatchSettings(budget_gb=1e-4)),
    "attribution_map": lambda out: attribution_map(
        pair(), prompts(QUERIES), out=out, settings=PatchSettings(budget_gb=1e-9)
    ),
    "edge_map": lambda out: edge_map(
        pair(), prompts(QUERIES), exact_cells=4, out=out, settings=PatchSettings(budget_gb=1e-9)
    ),
    "soft_patch": lambda out: soft_patch(
        pair(), prompts(QUERIES), SoftPatchSettings(bands=1, steps=3, held_out=2), out=out
    ),
    "map (job)": mapped,
    "perturb": perturbed,
    "stress": stressed,
    "audit": audited,
    "training": trained,
    "train-direction": narrow,
    "curves": drawn,
    "steer": steered,
    "compare": compared,
}


def started(run, out):
    """A child that runs an experiment; everything it needs is imported already."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        run(out)
        code = 0
    except BaseException:
        (Path(out).parent / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def to_the_end(run, out):
    """Seconds that a run takes."""
    begun = time.monotonic()
    status = os.waitpid(started(run, out), 0)[1]
    if status:
        raise AssertionError((Path(out).parent / "error.txt").read_text())
    return time.monotonic() - begun


def left(out):
    """All results in a folder, without what every call has of its own; tensors as bytes."""
    found = {}
    for file in sorted(Path(out).rglob("*")):
        if file.suffix == ".safetensors" and "checkpoint" not in str(file):
            found[str(file.relative_to(out))] = file.read_bytes()
        if file.name in ("result.json", "cell.json"):
            found[str(file.relative_to(out))] = _steady(json.loads(file.read_text()))
    return found


def _steady(value):
    if isinstance(value, dict):
        return {name: _steady(part) for name, part in value.items() if name not in VOLATILE}
    return [_steady(part) for part in value] if isinstance(value, list) else value


def trial(run, out, after):
    """Kill once, go on; rows that were there at the kill, and whether it came before the end."""
    child = started(run, out)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    rows = sum(file.read_bytes().count(b"\n") for file in Path(out).rglob("rows.jsonl"))
    to_the_end(run, out)
    return killed, rows


def result_of(name, kills):
    """One row of the table: what happened to an experiment."""
    torch.set_num_threads(1)  # a forked child has no pool of threads
    pair().identities(), base_model()  # before the clock
    run, generator = EXPERIMENTS[name], np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp())
    try:
        seconds = to_the_end(run, folder / "whole")
        expected, equal, killed, rows = left(folder / "whole"), 0, 0, []
        assert expected, f"{name} left no result"
        for number in range(kills):
            out = folder / f"trial{number}"
            early, kept = trial(run, out, float(generator.uniform(0.02, 0.95)) * seconds)
            killed, rows = killed + early, [*rows, kept]
            equal += left(out) == expected
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder)
    row = {
        "experiment": name,
        "kills": kills,
        "before the end": killed,
        "rows at the kill, median": statistics.median(rows),
    }
    return row | {"equal results": equal}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only or EXPERIMENTS:
        rows.append(result_of(name, arguments.kills))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if arguments.page:
        table = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        table += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
        arguments.page.write_text(PAGE + "\n".join(table) + "\n")
    if any(row["equal results"] < row["kills"] for row in rows):
        sys.exit("not every run that was killed ended with the results of an undisturbed one")


PAGE = """# Reliability

Written by `python benchmarks/kills.py --page docs/reliability.md`: every experiment with an output folder, on tiny
models, is killed (SIGKILL) at a random moment of its run and called again. *Equal results* counts the trials in which
every result file and every tensor was that of an undisturbed run. `tests/test_run.py` kills a run twenty times while
rows are written, and `tests/test_kills.py` every experiment once.

"""

if __name__ == "__main__":
    main()
