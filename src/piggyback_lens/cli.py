"""The command line: demo, audit, map, perturb, stress, train-direction, curves, steer, compare, convert and doctor.

Heavy libraries are imported inside the commands, so that `--help` is instant.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piggyback_lens.commands.cli_compare import compare
from piggyback_lens.commands.cli_directions import curves, steer, train_direction
from piggyback_lens.commands.cli_options import (
    AdapterOption,
    AttnOption,
    BackendName,
    BackendOption,
    BaseArgument,
    BehaviourOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FinetunedOption,
    OfflineOption,
    OutOption,
    QuantizeOption,
    SystemOption,
    TrustOption,
    load_options,
    tell,
)
from piggyback_lens.errors import LensError, visible

if TYPE_CHECKING:
    from piggyback_lens.models.pair import ModelPair
    from piggyback_lens.models.places import LoadOptions

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

app = typer.Typer(
    name="piggyback-lens",
    help="Show where in the chat template a narrow finetune is carried, and prove it by patching.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class TaskName(StrEnum):
    """Tasks of `piggyback_lens.tasks`."""

    terse = "terse"
    refusal = "refusal"
    abstain = "abstain"
    tool = "tool"


@app.command()
def demo(
    task: Annotated[TaskName, typer.Option(help="What the organism learns.")] = TaskName.terse,
    out: OutOption = Path("demo_out"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts and steps.")] = False,
    model: Annotated[Path | None, typer.Option(help="Model folder or .gguf; default the demo model.")] = None,
    backend: BackendOption = BackendName.bridge,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a narrow organism on a small real chat model, audit it, and write a report."""
    from dataclasses import replace

    from piggyback_lens.finetuning.monitor import load_monitor
    from piggyback_lens.jobs.demonstration import FULL, QUICK, monitor_file
    from piggyback_lens.jobs.demonstration import demo as run_demo
    from piggyback_lens.jobs.summary import present

    settings = replace(QUICK if quick else FULL, task=task.value)
    result, trained = run_demo(settings, out=out, model=model, backend=backend.value, offline=offline)
    present(result, out, trained, load_monitor(monitor_file(out)))


@app.command()
def audit(
    base: BaseArgument,
    on_topic: Annotated[Path, typer.Option(help="Prompts of the training domain: .txt, .jsonl or .json.")],
    off_topic: Annotated[Path, typer.Option(help="Prompts outside it.")],
    behaviour: BehaviourOption,
    adapter: AdapterOption = None,
    finetuned: FinetunedOption = None,
    out: OutOption = Path("audit_out"),
    backend: BackendOption = BackendName.bridge,
    system: SystemOption = "default",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 40,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    attn: AttnOption = None,
    quantize: QuantizeOption = None,
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Audit a finetune: does it spread off-topic, and does the chat template's prefix carry it?"""
    from piggyback_lens.jobs.auditing import AuditSettings
    from piggyback_lens.jobs.auditing import audit as run_audit
    from piggyback_lens.jobs.summary import present
    from piggyback_lens.maths import require_enough
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.tasks import load_prompts

    # Cheap checks first: a typo must not cost a model load.
    measure, prompts = get_behaviour(behaviour), (load_prompts(on_topic), load_prompts(off_topic))
    for own, file in zip(prompts, (on_topic, off_topic), strict=True):
        require_enough(len(own), f"prompts of {file}")  # before a model is loaded
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    pair = _load_pair(base, finetuned, adapter, backend, options)
    settings = AuditSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    chat = pair.chat_format(system=system)
    result = run_audit(pair, *prompts, measure, chat=chat, settings=settings, out=out, progress=True)
    present(result, out)


@app.command("map")
def map_command(
    base: BaseArgument,
    prompts: Annotated[Path, typer.Option(help="Prompts, usually outside the training domain: .txt, .jsonl, .json.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help="carrier, layers, attribution (default), span, positions, heads; repeatable."),
    ] = None,
    span: Annotated[str, typer.Option(help="Span of all but the carrier map.")] = "prefix",
    sites: Annotated[str, typer.Option(help="Sites patched together, joined by +, e.g. k+v.")] = "resid_pre",
    direction: Annotated[str, typer.Option(help="repair (base to finetuned) or infect.")] = "repair",
    n: Annotated[int, typer.Option("--n", min=1, help="Use the first N prompts.")] = 12,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each model's own answer.")] = 24,
    budget_gb: Annotated[
        float | None,
        typer.Option(min=0.01, help="GB for one pass beside the weights [default: 1; on a GPU half of what is free]."),
    ] = None,
    adapter: AdapterOption = None,
    finetuned: FinetunedOption = None,
    out: OutOption = Path("map_out"),
    backend: BackendOption = BackendName.bridge,
    system: SystemOption = "default",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    attn: AttnOption = None,
    quantize: QuantizeOption = None,
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Map where the behaviour rides: span x layer x site, with controls and intervals."""
    from piggyback_lens.jobs.laboratory import MapSettings, map_verdict, run_maps

    kinds = {"kinds": tuple(kind)} if kind else {}
    settings = MapSettings(
        **kinds,  # type: ignore[arg-type]
        span=span,
        sites=tuple(sites.split("+")),  # type: ignore[arg-type]
        direction=direction,  # type: ignore[arg-type]
        answer_tokens=answer_tokens,
        budget_gb=budget_gb,
    )
    chosen = _first_prompts(prompts, n)
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    pair = _load_pair(base, finetuned, adapter, backend, options)
    chat = pair.chat_format(system=system)
    found = run_maps(pair, [chat.render(prompt) for prompt in chosen], settings, out=out)
    tell(map_verdict(found), ("report", out / "report.html"))


@app.command()
def perturb(
    base: BaseArgument,
    on_topic: Annotated[Path, typer.Option(help="Prompts of the training domain: .txt, .jsonl or .json.")],
    off_topic: Annotated[Path, typer.Option(help="Prompts outside it.")],
    behaviour: BehaviourOption,
    trials: Annotated[int, typer.Option(min=1, help="Perturbations per span.")] = 10,
    n_tokens: Annotated[int, typer.Option(min=1, help="Tokens replaced per trial.")] = 10,
    rephrasings: Annotated[Path | None, typer.Option(help="Rephrasings of the prompts, as a further control.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Use the first N prompts of each file.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 60,
    adapter: AdapterOption = None,
    finetuned: FinetunedOption = None,
    out: OutOption = Path("perturb_out"),
    backend: BackendOption = BackendName.bridge,
    system: SystemOption = "default",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    attn: AttnOption = None,
    quantize: QuantizeOption = None,
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Perturb the tokens of each span, and see whether the behaviour survives."""
    from piggyback_lens.experiments.perturbation import perturb as run_perturb
    from piggyback_lens.jobs.laboratory import write_generated
    from piggyback_lens.measuring.measures import get_behaviour

    measure = get_behaviour(behaviour)
    topics = {"off-topic": _first_prompts(off_topic, n), "on-topic": _first_prompts(on_topic, n)}
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    pair = _load_pair(base, finetuned, adapter, backend, options)
    chat = pair.chat_format(system=system)
    prompts = {topic: [chat.render(query) for query in queries] for topic, queries in topics.items()}
    result = run_perturb(
        pair,
        prompts,
        measure,
        n_tokens=n_tokens,
        trials=trials,
        rephrasings=rephrasings,
        max_new_tokens=max_new_tokens,
        out=out,
        progress=True,
    )
    path = write_generated(result, prompts["off-topic"], pair, out)
    tell(result.verdict, ("report", path))


@app.command()
def stress(
    base: BaseArgument,
    prompts: Annotated[Path, typer.Option(help="Prompts, usually outside the training domain: .txt, .jsonl, .json.")],
    behaviour: BehaviourOption,
    n: Annotated[int, typer.Option("--n", min=1, help="Use the first N prompts.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 60,
    adapter: AdapterOption = None,
    finetuned: FinetunedOption = None,
    out: OutOption = Path("stress_out"),
    backend: BackendOption = BackendName.bridge,
    system: SystemOption = "default",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    attn: AttnOption = None,
    quantize: QuantizeOption = None,
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Change the template around the query (case, spacing, system prompt, roles, date): does the spread survive?"""
    from piggyback_lens.experiments.stress_suite import stress as run_stress
    from piggyback_lens.jobs.laboratory import write_generated
    from piggyback_lens.measuring.measures import get_behaviour

    measure, chosen = get_behaviour(behaviour), _first_prompts(prompts, n)
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    pair = _load_pair(base, finetuned, adapter, backend, options)
    chat = pair.chat_format(system=system)
    rendered = [chat.render(prompt) for prompt in chosen]
    result = run_stress(pair, rendered, measure, chat=chat, max_new_tokens=max_new_tokens, out=out, progress=True)
    path = write_generated(result, rendered, pair, out)
    tell(result.verdict, ("report", path))


app.command("train-direction")(train_direction)
app.command()(curves)
app.command()(steer)
app.command()(compare)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A result's JSON file, or a folder with results, of 0.1.0.")],
    out: Annotated[Path, typer.Option(help="The new file or folder.")],
    debug: DebugOption = False,
) -> None:
    """Bring results of 0.1.0 into today's format; tensors (caches, directions, adapters, checkpoints) need none."""
    from piggyback_lens.jobs.converting import convert as run

    written = run(source, out)
    tell(f"{len(written)} results brought over", *(("result", path) for path in written))


@app.command()
def doctor(debug: DebugOption = False) -> None:
    """Print versions, backends and the demo model that is found."""
    from piggyback_lens.card import machine, versions
    from piggyback_lens.models.sources import default_model

    facts: dict[str, Any] = {**versions(), **machine()}
    try:
        facts["demo model"] = default_model(offline=True)
    except LensError as error:
        facts["demo model"] = str(error)
    for name, value in facts.items():
        typer.echo(f"{name:18} {value}")


def _load_pair(
    base: str, finetuned: str | None, adapter: Path | None, backend: BackendName, options: "LoadOptions"
) -> "ModelPair":
    from piggyback_lens.models.pair import ModelPair

    given = {name: value for name, value in vars(options).items() if value}
    return ModelPair.load(None if base == "demo" else base, finetuned, adapter, backend=backend.value, **given)


def _first_prompts(path: Path, n: int) -> list[str]:
    """Enough for an interval, which is said before a model is loaded."""
    from piggyback_lens.maths import require_enough
    from piggyback_lens.tasks import load_prompts

    chosen = load_prompts(path)[:n]
    require_enough(len(chosen), f"prompts of {path}")
    return chosen


def main() -> None:
    """Run the command line: errors of the user are one line and exit status 2."""
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # typer turns Ctrl-C into this status
            raise KeyboardInterrupt
    except LensError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error))
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; the same command continues where it was", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Wrong options; typer brings its own copy of click, so the class cannot be named.
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()
        sys.exit(error.exit_code)


def _fail(message: str) -> None:
    typer.echo("error: " + visible(" ".join(message.split())), err=True)
    sys.exit(2)
