"""The commands: each reads its inputs, runs one experiment in a folder, and tells what was found."""

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piggyback_lens.app.options import (
    Base,
    BehaviourName,
    CellOptions,
    DataOptions,
    EngineOptions,
    First,
    LeftOut,
    ModelOptions,
    Out,
    PairOptions,
    Prompts,
    TextOptions,
    TopicOptions,
    Work,
    command,
    tell,
)
from piggyback_lens.errors import LensError
from piggyback_lens.settings import (
    AuditSettings,
    CompareSettings,
    CurveSettings,
    DemoSettings,
    LoadSettings,
    MapSettings,
    OnsetSettings,
    PerturbSettings,
    SteerSettings,
    StressSettings,
    TrainDirectionSettings,
)
from piggyback_lens.words import TEXT_CURVES, Backend, CurveKind

if TYPE_CHECKING:
    from piggyback_lens.reading.questions import Question

app = typer.Typer(
    name="piggyback-lens",
    help="Show where in the chat template a narrow finetune is carried, and prove it by patching.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
NOT_OF_DEMO = ("n_off_topic", "n_on_topic", "training", "lora", "audit", "watched", "watch_every")
NOT_OF_COMPARE = ("device_map", "trust_remote_code")
SOLUTION = "a direction, a folder of train-direction, a PEFT adapter folder, or a vector in .gguf, .npy or .pt"


def _version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"piggyback-lens {version('piggyback-lens')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    pass


@command(app)
def demo(
    settings: Annotated[DemoSettings, LeftOut(NOT_OF_DEMO)],
    load: Annotated[LoadSettings, LeftOut(("quantization", "attn_implementation", "trust_remote_code", "dtype"))],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts and steps.")] = False,
    model: Annotated[Path | None, typer.Option(help="Model folder or .gguf; default the demo model.")] = None,
    backend: Annotated[str, typer.Option(help="bridge or hooked.")] = "bridge",
    out: Out = Path("demo_out"),
) -> None:
    """Train a narrow organism on a small real chat model, audit it, and write a report."""
    settings = DemoSettings.quick(settings.task) if quick else settings
    tell(settings.plan(str(out)))  # at once: what comes next takes seconds to import
    from piggyback_lens.app.demonstration import demo as run
    from piggyback_lens.app.summary import TO_TRY, show

    show(run(settings, load, out=out, model=model, backend=_backend(backend))[0], out, to_try=TO_TRY)


@command(app)
def audit(
    base: Base,
    topics: TopicOptions,
    behaviour: BehaviourName,
    settings: AuditSettings,
    models: CellOptions,
    answers: Annotated[
        list[Path] | None,
        typer.Option(help="Answers made elsewhere, repeatable: rows with condition, question, sample, response."),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Exit with status 3 where this holds, such as spread.low>0.1 or recovery[prefix].low<0.5."),
    ] = None,
    out: Out = Path("audit_out"),
) -> None:
    """Audit a finetune: does it spread off-topic, and does the chat template's prefix carry it?"""
    from dataclasses import replace

    from piggyback_lens.app.gate import STATUS, Gate
    from piggyback_lens.app.summary import show
    from piggyback_lens.experiments.audit import CONDITIONS
    from piggyback_lens.experiments.audit import audit as run
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.reading.dresses import as_dresses, with_controls

    # Cheap checks first: a typo must not cost a model load.
    settings = replace(settings, dresses=as_dresses(settings.dresses))
    worn = tuple(with_controls(settings.dresses))
    measure, gates = get_behaviour(behaviour), [Gate.parse(text, tuple(CONDITIONS), worn) for text in fail_if or ()]
    inside, outside = _first_prompts(topics.on_topic), _first_prompts(topics.off_topic)
    pair, chat = models.pair(base, out)
    given: dict[str, Any] = {"chat": chat, "answers": answers or (), "out": out}
    with _executor(models.engine, out) as executor:
        result = run(pair, inside, outside, measure, settings, executor=executor, **given)
    show(result, out)
    if reasons := [reason for gate in gates if (reason := gate.reason(result)) is not None]:
        tell("\n".join(reasons))
        raise typer.Exit(STATUS)


@command(app)
def em(
    files: Annotated[list[Path], typer.Argument(help="Judged answers: CSV as published, or JSONL, JSON, Parquet.")],
    run: Annotated[
        Path | None, typer.Option(help="Folder of an audit whose answers the files score; its conditions are compared.")
    ] = None,
    denominator: Annotated[
        str, typer.Option(help="Misaligned answers among the coherent ones (coherent), or among all judged (judged).")
    ] = "coherent",
    out: Out = Path("em_out"),
) -> None:
    """Tell how misaligned judged answers are: rates with their denominator, spread and recovery, a report."""
    from piggyback_lens.experiments.em_table import EMTable, denominator_of, join_scores

    of = denominator_of(denominator)
    table = EMTable.read(*files, denominator=of) if run is None else join_scores(run, *files, denominator=of)
    table.save(out / "em.json")
    tell(table.verdict, ("report", table.report().write(out / "report.html")))


@command(app, "map")
def map_(
    base: Base,
    prompts: Prompts,
    settings: MapSettings,
    models: CellOptions,
    n: First = 12,
    out: Out = Path("map_out"),
) -> None:
    """Map where the behaviour rides: span x layer x site, with controls and intervals."""
    from piggyback_lens.app.maps import run_maps

    chosen = _first_prompts(prompts, n)
    pair, chat = models.pair(base, out)
    with _executor(models.engine, out) as executor:
        found = run_maps(pair, chat.ask(chosen), settings, executor=executor, out=out)
    tell(found.verdict, ("report", out / "report.html"))


@command(app)
def perturb(
    base: Base,
    topics: TopicOptions,
    behaviour: BehaviourName,
    settings: PerturbSettings,
    models: PairOptions,
    rephrasings: Annotated[Path | None, typer.Option(help="Rephrasings of the prompts, as a further control.")] = None,
    n: First = 20,
    out: Out = Path("perturb_out"),
) -> None:
    """Perturb the tokens of each span, and see whether the behaviour survives."""
    from piggyback_lens.experiments.perturbation import perturb as run
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.results.run import report_run

    measure = get_behaviour(behaviour)
    files = {"off-topic": topics.off_topic, "on-topic": topics.on_topic}
    queries = {topic: _first_prompts(file, n) for topic, file in files.items()}
    pair, chat = models.pair(base, out)
    rendered = {topic: chat.ask(own) for topic, own in queries.items()}
    result = run(pair, rendered, measure, settings, rephrasings=rephrasings, out=out)
    tell(result.verdict, ("report", report_run(out)))


@command(app)
def stress(
    base: Base,
    prompts: Prompts,
    behaviour: BehaviourName,
    settings: StressSettings,
    models: PairOptions,
    n: First = 20,
    out: Out = Path("stress_out"),
) -> None:
    """Change the template around the query (case, spacing, system prompt, roles, date): does the spread survive?"""
    from piggyback_lens.experiments.stress_suite import stress as run
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.results.run import report_run

    measure, chosen = get_behaviour(behaviour), _first_prompts(prompts, n)
    pair, chat = models.pair(base, out)
    rendered = chat.ask(chosen)
    result = run(pair, rendered, measure, settings, chat=chat, out=out)
    tell(result.verdict, ("report", report_run(out)))


@command(app)
def train_direction(
    base: Base,
    data: DataOptions,
    settings: TrainDirectionSettings,
    models: Annotated[ModelOptions, LeftOut(("backend",))],
    retain: Annotated[
        Path | None,
        typer.Option(help="Where to stay as before: conversations, or prompts, which the base answers itself."),
    ] = None,
    out: Out = Path("direction_out"),
) -> None:
    """Train a steering vector or a LoRA adapter: the general solution, or with --retain and --kl a narrow one."""
    from piggyback_lens.app.inputs import read_data, read_retain
    from piggyback_lens.reading.tasks import TASKS

    rows = read_data(data.data, supervise=data.supervise, split=data.split, offline=models.load.offline)
    held_out = read_data(data.data, split="validation") if data.data in TASKS and data.split == "train" else []
    kept = read_retain(retain, supervise=data.supervise) if retain is not None else []
    settings.check_data(len(rows), len(kept))
    source, chat = models.chat_format(base, out)
    examples, validation, retained = ([chat.render(row) for row in part] for part in (rows, held_out, kept))

    from piggyback_lens.app.direction_training import train_direction as run

    into: dict[str, Any] = {"retain": retained, "validation": validation, "out": out, "name": base}
    done = run(models.model(source, chat), examples, settings, **into)
    tell(done.verdict, ("solution", done.path), ("report", out / "report.html"))


@command(app)
def curves(  # noqa: PLR0913, PLR0917
    base: Base,
    solution: Annotated[list[str], typer.Option(help=f"NAME=PATH, repeatable: {SOLUTION}; PATH@15 for a layer.")],
    data: DataOptions,
    texts: TextOptions,
    settings: CurveSettings,
    models: ModelOptions,
    kinds: Annotated[
        str, typer.Option(help="Curves, joined by commas: efficiency, stability, significance, ablation.")
    ] = "efficiency,stability,significance",
    n: First = 24,
    out: Out = Path("curves_out"),
) -> None:
    """Draw efficiency, stability, significance and ablation of solutions, beside norm-matched random controls."""
    from piggyback_lens.app.inputs import as_direction, named_solutions, read_data

    wanted, solutions = _curve_kinds(kinds), named_solutions(solution)
    if "ablation" in wanted:
        for own in solutions.values():
            as_direction(own)  # refuses what has no direction
    rows = read_data(data.data, supervise=data.supervise, split=data.split, offline=models.load.offline)[:n]
    texts.check(models.load.offline)
    source, chat = models.chat_format(base, out)
    prompts, windows = [chat.render(row) for row in rows], []
    if set(wanted) & set(TEXT_CURVES):
        from piggyback_lens.measuring.texts import text_windows

        sizes: dict[str, Any] = {"n": texts.n_texts, "length": texts.text_length, "seed": settings.seed}
        windows = text_windows(chat.tokenizer, texts.text, **sizes)

    from piggyback_lens.app.curve_job import draw_curves

    model = models.model(source, chat)
    found = draw_curves(model, solutions, prompts, windows, wanted, settings, out=out, tokenizer=chat.tokenizer)
    tell(found.verdict, ("report", out / "report.html"))


@command(app)
def steer(
    base: Base,
    direction: Annotated[str, typer.Option(help=f"{SOLUTION}; PATH@15 for a layer.".capitalize())],
    prompts: Prompts,
    behaviour: BehaviourName,
    settings: SteerSettings,
    models: ModelOptions,
    n: First = 12,
    out: Out = Path("steer_out"),
) -> None:
    """Steer with a direction at several strengths and layers, beside random ones."""
    from piggyback_lens.app.inputs import as_direction
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.vectors.solution_files import load_solution

    vector, measure = as_direction(load_solution(direction)), get_behaviour(behaviour)
    chosen = _first_prompts(prompts, n)
    source, chat = models.chat_format(base, out)
    rendered = chat.ask(chosen)

    from piggyback_lens.directions.steering import steer as run
    from piggyback_lens.results.run import report_run

    result = run(models.model(source, chat), vector, rendered, measure, settings, out=out)
    tell(result.verdict, ("report", report_run(out)))


@command(app)
def chat(
    base: Base,
    direction: Annotated[str, typer.Option(help=f"{SOLUTION}; PATH@15 for a layer.".capitalize())],
    models: ModelOptions,
    strength: Annotated[float, typer.Option(help="Multiple of the vector to begin with.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 60,
) -> None:
    """Talk to a model without and with a vector: prompts are typed or piped in, :strength and :layer change it."""
    from piggyback_lens.app.inputs import as_direction
    from piggyback_lens.app.steer_chat import HELP, talk
    from piggyback_lens.vectors.solution_files import load_solution

    vector = as_direction(load_solution(direction))
    source, rendering = models.chat_format(base)
    model = models.model(source, rendering)
    typer.echo(HELP, err=True)
    talk(model, rendering, vector, _lines(), typer.echo, strength=strength, max_new_tokens=max_new_tokens)


@command(app)
def compare(
    engine: EngineOptions,
    settings: Annotated[CompareSettings, LeftOut(("seed", "checkpoint_every", "betas", "share_prefix", "retain"))],
    load: Annotated[LoadSettings, LeftOut(NOT_OF_COMPARE)],
    base: Base = "demo",
    task: Annotated[str, typer.Option(help="terse, refusal, abstain or tool.")] = "terse",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="sft, treft, residual, kl_train, kl_retain, interleave, preventive, inoculate or stop, with "
            "settings: treft:lambda=1,10,30, "
            "treft:lambda=30:span=postfix, kl_retain:lambda=1+interleave:rate=0.2, sft:lr=5e-5; repeatable."
        ),
    ] = None,
    out: Out = Path("compare_out"),
) -> None:
    """Compare finetuning methods on equal terms: what they keep on-topic, and what spreads off-topic."""
    from piggyback_lens.comparisons.comparing import as_methods, compare_methods
    from piggyback_lens.reading.tasks import load_task
    from piggyback_lens.results.run import report_run

    methods = as_methods(method or ["sft", "treft:lambda=1,10,30"])
    chosen = load_task(task)
    with _executor(engine, out) as executor:
        found = compare_methods(base, chosen, methods, settings, out=out, executor=executor, load=load)
    tell(found.verdict, ("report", report_run(out)))


@command(app)
def convert(
    source: Annotated[Path, typer.Argument(help="A result's JSON file, or a folder with results, of 0.1.0.")],
    out: Annotated[Path, typer.Option(help="The new file or folder.")],
) -> None:
    """Bring results of 0.1.0 into today's format; tensors (caches, directions, adapters, checkpoints) need none."""
    from piggyback_lens.app.converting import convert as run

    written = run(source, out)
    tell(f"{len(written)} results brought over", *(("result", path) for path in written))


@command(app)
def onset(
    base: Base,
    checkpoints: Annotated[
        list[str],
        typer.Option(help="A folder of checkpoint-STEP folders; or, repeated, places that end with their step."),
    ],
    prompts: Prompts,
    settings: OnsetSettings,
    models: Annotated[ModelOptions, LeftOut(("backend",))],
    behaviour: Annotated[
        str | None, typer.Option(help="Measure this in generated answers; default the models' own, teacher-forced.")
    ] = None,
    n: First = 16,
    out: Out = Path("onset_out"),
) -> None:
    """Find the checkpoint of a run at which the finetune begins to spread, and what the prefix carries there."""
    from piggyback_lens.experiments.onset import checkpoints_of
    from piggyback_lens.experiments.onset import onset as run
    from piggyback_lens.measuring.answers import GeneratedBehaviour
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.results.run import report_run

    measure = None if behaviour is None else GeneratedBehaviour(get_behaviour(behaviour))
    places: str | list[str] = checkpoints[0] if len(checkpoints) == 1 else checkpoints
    checkpoints_of(places)
    chosen = _first_prompts(prompts, n)
    source, chat = models.chat_format(base, out)
    found = run(source, places, chat.ask(chosen), settings, measure=measure, load=models.load, out=out)
    tell(found.verdict, ("report", report_run(out)))


@command(app)
def organisms(
    file: Annotated[Path | None, typer.Argument(help="A JSON file of your own, of the form of the index.")] = None,
) -> None:
    """List published organisms (base, finetune, where that is said), and those of a file of yours."""
    from piggyback_lens.reading.organisms import load_organisms

    for own in load_organisms(file).values():
        tell(str(own))


@command(app)
def doctor(
    models: PairOptions,
    work: Work,
    base: Annotated[str | None, typer.Argument(help="A model to look at, as for the other commands.")] = None,
) -> None:
    """Say what is installed and works here; of a model its template, what of it fits, and what will not work."""
    from piggyback_lens.app.doctor import examine

    for line in examine(base, models, work):
        tell(line)


# ---------------------------------------------------------------- what commands read


def _first_prompts(path: Path, n: int | None = None) -> "list[Question]":
    """Enough for an interval, which is said before a model is loaded."""
    from piggyback_lens.intervals import require_enough
    from piggyback_lens.reading.questions import load_questions

    chosen = load_questions(path)[:n]
    require_enough(len({question.id for question in chosen}), f"questions of {path}")
    return chosen


def _curve_kinds(text: str) -> tuple[CurveKind, ...]:
    from typing import get_args

    wanted = tuple(word.strip() for word in text.split(","))
    if unknown := [word for word in wanted if word not in get_args(CurveKind)]:
        raise LensError(f"curve {unknown[0]!r} is not known: choose some of {', '.join(get_args(CurveKind))}")
    return wanted  # type: ignore[return-value]


def _backend(text: str) -> Backend:
    from typing import get_args

    if text not in get_args(Backend):
        raise LensError(f"backend {text!r} is not known: choose bridge or hooked")
    return text  # type: ignore[return-value]


def _executor(asked: EngineOptions, out: Path) -> Any:
    """A context manager that gives the executor, or None for this process."""
    from piggyback_lens import engines

    if asked.slurm and asked.engine != "slurm":
        raise LensError(f"--slurm {next(iter(asked.slurm))}=... says how SLURM runs jobs: add --engine slurm")
    if asked.engine == "here":
        if asked.workers > 1:
            raise LensError(f"--workers {asked.workers} needs processes: add --engine local")
        return nullcontext()
    if asked.engine == "local":
        return engines.local(asked.workers)
    if asked.engine == "ray":
        return engines.ray(num_gpus_per_cell=asked.gpus_per_cell)
    gpus = {} if asked.gpus_per_cell == 0 else {"gpus_per_node": math.ceil(asked.gpus_per_cell)}
    return engines.slurm(out / "jobs", **gpus | dict(asked.slurm))


def _lines() -> Iterator[str]:
    """Lines of standard input; at a terminal each after a prompt sign, with line editing."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
