"""Finetuning methods on equal terms: the same data, steps and seeds for all, cells of a grid run one by one.

    found = compare_methods("demo", load_task("terse"), ["sft", "treft:lambda=3,30"], out="grid")
    found.table(); found.pareto_figure()

Every cell trains a fresh adapter and is written as soon as it is finished; the same call continues a run that
was stopped, and in several processes at once it shares the work. A folder can be extended by further methods,
seeds and values of the axes. A cell that fails is named at the end; it stops no other.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from piggyback_lens.card import machine, versions
from piggyback_lens.comparisons.comparison import Comparison
from piggyback_lens.comparisons.comparison_cells import check_cells, prepare_cells, run_cell
from piggyback_lens.comparisons.comparison_plan import (
    BASE_FILE,
    CELL_FILE,
    Cell,
    Plan,
    Source,
    base_folder,
    cell_folder,
    question_of,
    system_name,
)
from piggyback_lens.comparisons.methods import Method, parse_method, plain_finetuning
from piggyback_lens.engines import Job, cause, failure, finished, passed
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.models.sources import default_model
from piggyback_lens.progress import counting, say, shows
from piggyback_lens.reading.tasks import TASKS, Task, load_task
from piggyback_lens.results.run import refuse_other
from piggyback_lens.settings import AXES, CompareSettings, LoadSettings
from piggyback_lens.vectors.task_vectors import mean_by_layer, update_cosines

RETAIN = 48
"""Retain prompts, by default questions of the other built-in tasks."""
GRID_FILE = "grid.json"
POLL = 2.0
"""Seconds between two looks at cells that other processes hold, where nothing else is left to do."""


@shows("comparison")
def compare_methods(
    base: Source,
    task: Task | str,
    methods: Sequence[Method | str],
    settings: CompareSettings = CompareSettings(),
    *,
    out: str | Path,
    executor: Executor | None = None,
    progress: bool | str = True,
    load: LoadSettings = LoadSettings(),
) -> Comparison:
    """Train and measure every cell of methods × seeds × systems × shares × sizes × epochs.

    Measured are the behaviour of greedy answers on- and off-topic, plain and in the dresses of the settings,
    how likely the base finds the off-topic ones, KL(base ‖ tuned) on the base's own off-topic answers, the loss on
    plain text, the drift of the prefix's keys and values, and the weight update.

    Args:
        base: folder, hub id or GGUF file of the base, "demo" for the demo model; or a function at the top level of a
            module that returns (transformers model, tokenizer).
        task: a task or the name of a built-in one.
        methods: methods or their specs, such as "treft:lambda=3,30".
        settings: what is varied, trained and measured.
        out: folder of the run: grid.json, base/, cells/ and result.json.
        executor: runs the cells: any executor of concurrent.futures, such as processes or Ray; None for this process.
            Machines of a cluster go by their own clocks.
        progress: show a bar with the time left, and name the cells on the way.
        load: how the base's weights are loaded: dtype, device, quantisation, ...

    Raises:
        LensError: settings that do not fit, a method that cannot be set up, or the folder of another comparison,
            before anything is trained; or cells that failed, after the others are finished and saved.
    """
    chosen = load_task(task) if isinstance(task, str) else task
    prompts = default_retain(chosen) if settings.retain is None else tuple(settings.retain)
    source = default_model(offline=load.offline) if base == "demo" else base
    plan = Plan(source, chosen, settings, prompts, load)
    for topic in ("on", "off"):
        plan.prompts(topic)
    cells = grid(as_methods(methods), settings)
    check_cells(plan, cells)
    folder = Path(out).absolute()
    _open(folder, plan, cells)
    deadline = None if settings.minutes is None else time.time() + 60 * settings.minutes
    failed = _run(plan, cells, folder, executor, deadline, progress)
    if failed and not _done(cells, folder):
        raise failure(failed, len(cells), None) from next(iter(failed.values()))
    found = gather(plan, cells, folder)
    saved = found.save(folder)
    if failed:
        raise failure(failed, len(cells), saved) from next(iter(failed.values()))
    return found


def default_retain(task: Task) -> tuple[str, ...]:
    """Training questions of the built-in tasks other than this one, taken in turn."""
    others = [[question_of(example) for example in load_task(name).train] for name in TASKS if name != task.name]
    own = {question_of(example) for example in task.train}
    turns = (text for row in zip_longest(*others) for text in row if text is not None and text not in own)
    return tuple(text for _, text in zip(range(RETAIN), turns, strict=False))


def as_methods(methods: Iterable[Method | str]) -> tuple[Method, ...]:
    """Methods and specs, each method once.

    Raises:
        LensError: no method, or a spec that cannot be read.
    """
    found = chain.from_iterable((m,) if isinstance(m, Method) else parse_method(m) for m in methods)
    once = tuple(dict.fromkeys(found))
    if not once:
        raise LensError('no method was given: give at least one, e.g. "sft" and "treft:lambda=30"')
    return once


def grid(methods: Sequence[Method], settings: CompareSettings) -> tuple[Cell, ...]:
    """All cells, those of the first seed first, so that a run that is stopped early has compared something."""
    axes = product(*(getattr(settings, name) for name in AXES), methods)
    return tuple(Cell(method, seed, system, share, size, passes) for seed, system, share, size, passes, method in axes)


def _open(folder: Path, plan: Plan, cells: Sequence[Cell]) -> None:
    """Begin the folder, or continue it; refuse that of another comparison, or a cell of one."""
    file, asked = folder / GRID_FILE, plan.identity()
    if not file.exists():
        write_json(file, asked)
    refuse_other(file, *_comparable(read_json(file), asked))
    for cell in cells:
        done = cell_folder(folder, cell) / CELL_FILE
        if done.exists():
            refuse_other(done, *_comparable(read_json(done)["identity"], {**asked, "cell": cell.settings()}))


def _comparable(saved: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what older folders do not say, or say together with the versions that wrote a model's files.

    There too models are told apart: by their logits, before a cell is run.
    """
    if "reading" in asked and "reading" not in saved:
        saved = {name: value for name, value in saved.items() if name != "model"}
        asked = {
            name: value for name, value in asked.items() if name != "reading" and (name != "weights" or name in saved)
        }
    return saved, asked


def _run(
    plan: Plan,
    cells: Sequence[Cell],
    folder: Path,
    executor: Executor | None,
    deadline: float | None,
    progress: bool | str,
) -> dict[str, Exception]:
    """The base's part of every system prompt, then the cells that are not there. Gives the errors of those that failed.

    Raises:
        LensError: the base's part, or a method that cannot be set up; no cell has been begun then.
    """
    done = _done(cells, folder)
    waiting = [cell for cell in cells if cell not in done]
    if progress and waiting:
        say(f"{len(waiting)} of {len(cells)} cells to run")
    prepare: list[Job] = []
    for system in dict.fromkeys(cell.system for cell in cells):
        own = tuple(cell for cell in waiting if cell.system == system)
        prepare.append((prepare_cells, plan, system, own, str(folder)))
    for _, outcome in finished(prepare, executor):
        if isinstance(outcome, Exception):
            raise outcome
    failed: dict[str, Exception] = {}
    told = not progress
    with counting(len(waiting)) as advance:
        while waiting and not passed(deadline):
            held: list[Cell] = []
            jobs: list[Job] = [(run_cell, plan, cell, str(folder)) for cell in waiting]
            for number, outcome in finished(jobs, executor, deadline):
                cell = waiting[number]
                if outcome is None:
                    held.append(cell)
                    continue
                advance(1)
                if isinstance(outcome, Exception):
                    failed[cell.name] = outcome
                if progress:
                    say(f"{cell.name} failed: {cause(outcome)}" if cell.name in failed else f"finished {cell.name}")
            if held and len(held) == len(waiting):
                if not told:
                    say(f"other processes are at the {len(held)} cells that are left: waiting for them")
                told = True
                time.sleep(POLL)
            waiting = held
    return failed


def _done(cells: Sequence[Cell], out: str | Path) -> list[Cell]:
    return [cell for cell in cells if (cell_folder(out, cell) / CELL_FILE).exists()]


def gather(plan: Plan, cells: Sequence[Cell], out: str | Path) -> Comparison:
    """The comparison of those of the cells that are finished.

    Raises:
        LensError: none is.
    """
    done = _done(cells, out)
    if not done:
        raise LensError(f"{out} holds no finished cell of these yet: give it more time, or look for an error above")
    rows = [{**read_json(cell_folder(out, cell) / CELL_FILE), "cosines": _cosines(cell, done, out)} for cell in done]
    systems = dict.fromkeys(cell.system for cell in done)
    bases = {system_name(system): read_json(base_folder(out, system) / BASE_FILE) for system in systems}
    card: dict[str, Any] = {"task": plan.task.name, "behaviour": plan.task.behaviour, "settings": plan.identity()}
    card |= {"asked": len(cells), "finished": len(done), "versions": versions(), "machine": machine()}
    return Comparison(tuple(rows), bases, card)


def _cosines(cell: Cell, done: Sequence[Cell], out: str | Path) -> dict[str, list[float]]:
    """Cosines of a cell's weight update, by layer, to plain finetuning with its seed, and with the others' seeds.

    Of adapters that are there: a folder that was handed on may have the rows alone.
    """
    beside = [other for other in done if other.axes == cell.axes]
    plain = plain_finetuning(cell.method, (other.method for other in beside))
    same = [other for other in beside if other.method == plain]

    def by_layer(others: Sequence[Cell]) -> list[float]:
        own, *folders = (cell_folder(out, other) / "adapter" for other in (cell, *others))
        tables = [update_cosines(own, folder) for folder in folders if own.exists() and folder.exists()]
        return list(mean_by_layer(tables).values())

    return {
        "sft": by_layer([other for other in same if other.seed == cell.seed]),
        "sft_seeds": by_layer([other for other in same if other.seed != cell.seed]),
    }
