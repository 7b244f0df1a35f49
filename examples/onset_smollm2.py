"""Where does a finetune begin to spread, and does a bisection of its checkpoints find it?

python examples/onset_smollm2.py onset_out docs [--seeds 0,1,2]

The demo's task is trained on the demo's model, its adapter saved every few steps; then `onset` looks for the first
checkpoint whose spread is told from noise, once by bisection and once at every checkpoint (the second run measures only
what the first has left out). Finished parts are not run again.
"""

import argparse
import sys
import time
from pathlib import Path

from piggyback_lens import (
    ChatFormat,
    LensError,
    LoadSettings,
    LoRASettings,
    OnsetSettings,
    TrainSettings,
    __version__,
    add_lora,
    default_model,
    load_causal_lm,
    load_task,
    load_tokenizer,
    onset,
    train,
)
from piggyback_lens.files import atomic_write_text
from piggyback_lens.intervals import interval_text, percent

TASK, RATE, STEPS, EVERY, BATCH = "terse", 2e-4, 16, 2, 8
PROMPTS, BOUNDS = 12, (0.0, 0.05, 0.1)
COLUMNS = (
    "seed",
    "bound",
    "bisection",
    "measured",
    "every checkpoint",
    "spread there",
    "spread at the end",
    "prefix at the end",
)
LOAD = LoadSettings(device="cpu")


def trained(out: Path, chat: ChatFormat, seed: int) -> Path:
    """The run, its adapter in checkpoint-<step> every few steps."""
    run, task = out / f"seed_{seed}", load_task(TASK)
    if (run / f"checkpoint-{STEPS}" / "adapter_config.json").exists():
        return run
    model = add_lora(load_causal_lm(default_model(), LOAD), LoRASettings(), seed=seed)

    def keep(row: dict) -> None:
        if row["step"] % EVERY == 0:
            model.save_pretrained(run / f"checkpoint-{row['step']}", save_embedding_layers=False)

    examples = [chat.render(example["messages"]) for example in task.train]
    settings = TrainSettings(steps=STEPS, batch_size=BATCH, learning_rate=RATE, seed=seed, checkpoint_every=EVERY)
    train(model, examples, settings, out=run / "state", on_step=keep, progress=False)
    return run


def measured(out: Path, chat: ChatFormat, seed: int, bound: float):
    """By bisection, and at every checkpoint, of one folder."""
    run, prompts = trained(out, chat, seed), chat.ask(load_task(TASK).off_topic[:PROMPTS])
    found = []
    for search in ("bisect", "all"):
        start = time.perf_counter()
        settings = OnsetSettings(bound=bound, search=search)
        found.append(
            onset(default_model(), run, prompts, settings, load=LOAD, out=out / f"onset_{seed}", progress=False)
        )
        print(f"seed {seed}, {search}: {time.perf_counter() - start:.0f} s. {found[-1].verdict}", flush=True)
    return found


def shown(estimate) -> str:
    return interval_text(estimate.value, estimate.low, estimate.high)


def line(seed: int, bound: float, halved, every) -> str:
    first, last = every.onset, every.steps[-1]
    there = "" if first is None else shown(every.spread(first))
    part = every.recovery(last)
    cells = [
        seed,
        f"{bound:g}",
        halved.onset or "none",
        f"{len(halved.steps)} of {len(every.steps)}",
        first or "none",
        there,
    ]
    cells += [shown(every.spread(last)), percent(part.value, part.low, part.high)]
    return f"| {' | '.join(map(str, cells))} |"


INTRODUCTION = """# Where does it begin to spread?

**Made with piggyback_lens {version}** by `python examples/onset_smollm2.py onset_out docs --seeds {seeds}`; no number
is typed by hand.

`onset` measures the checkpoints of a run and finds the first one whose spread lies beyond a bound with its whole 95 %
interval. By default it bisects: the last checkpoint, the first, and then those in between that tell. That takes for
granted that what spreads once goes on spreading; `search="all"` in the same folder measures the rest and shows whether
it does. Here the task is {task} on SmolLM2-135M at rate {rate:g}, {steps} steps of {batch} rows, saved every {every};
{prompts} off-topic questions, the contrast of the last checkpoint's own answers and the base's in nats per token,
bounds of three sizes. Such a teacher-forced measure moves before any answer does, so what counts as spread is the
bound's to say; at bound 0 it is all that can be told from noise.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the runs; continued if it is there")
    parser.add_argument("docs", type=Path, help="folder for the page")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    chat = ChatFormat(load_tokenizer(default_model()))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    both = {(seed, bound): measured(options.out, chat, seed, bound) for seed in seeds for bound in BOUNDS}
    facts = {
        "seeds": options.seeds,
        "task": TASK,
        "rate": RATE,
        "steps": STEPS,
        "batch": BATCH,
        "every": EVERY,
        "prompts": PROMPTS,
    }
    text = [INTRODUCTION.format(version=__version__, **facts)]
    text += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    text += [line(*key, *found) for key, found in both.items()]
    same = sum(halved.onset == every.onset for halved, every in both.values())
    text.append(f"\nThe bisection finds what measuring every checkpoint finds in {same} of {len(both)} searches.\n")
    options.docs.mkdir(parents=True, exist_ok=True)
    every = both[seeds[0], BOUNDS[1]][1]
    every.save_figure(options.docs / "onset_terse.png")
    text.append(f"![Spread and prefix recovery by step](onset_terse.png)\n\n*Seed {seeds[0]}. {every.verdict}*\n")
    atomic_write_text(options.docs / "onset.md", "\n".join(text))
    print(options.docs / "onset.md")


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
