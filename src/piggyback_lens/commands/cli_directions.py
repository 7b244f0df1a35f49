"""The commands on directions: train-direction, curves and steer. Heavy libraries are imported inside them."""

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piggyback_lens.commands.cli_options import (
    AttnOption,
    BackendName,
    BackendOption,
    BaseArgument,
    DebugOption,
    DeviceOption,
    DtypeOption,
    OfflineOption,
    OutOption,
    QuantizeOption,
    SystemOption,
    TrustOption,
    load_options,
    tell,
)
from piggyback_lens.errors import LensError

if TYPE_CHECKING:
    from piggyback_lens.conversations.chat import ChatFormat
    from piggyback_lens.models.places import LoadOptions


class SolutionName(StrEnum):
    """What `train-direction` trains."""

    vector = "vector"
    lora = "lora"


class NoiseName(StrEnum):
    """Matrices of an adapter that get noise."""

    both = "both"
    a = "A"
    b = "B"


DATA_HELP = "Conversations: a task (terse, refusal, abstain, tool), a .jsonl file of messages, or a hub dataset."
DataOption = Annotated[str, typer.Option(help=DATA_HELP)]
SplitOption = Annotated[str, typer.Option(help="Split of a task (train, validation) or of a hub dataset.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def train_direction(
    base: BaseArgument,
    data: DataOption,
    kind: Annotated[SolutionName, typer.Option(help="A steering vector, or a LoRA adapter.")] = SolutionName.vector,
    layer: Annotated[int | None, typer.Option(min=0, help="Layer; default the middle one for a vector.")] = None,
    layers: Annotated[str | None, typer.Option(help="Several layers: 3,5,10-20; default all for lora.")] = None,
    site: Annotated[str, typer.Option(help="Where a vector is added: resid_post, mlp_out ...")] = "resid_post",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of an adapter; default 1.")] = None,
    modules: Annotated[
        str | None, typer.Option(help="Modules of an adapter, of q,k,v,o,gate,up,down; default down.")
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(help="Where to stay as before: conversations, or prompts, which the base answers itself."),
    ] = None,
    kl: Annotated[
        float | None, typer.Option("--kl", min=0, help="Weight of the KL to the base on --retain; makes it narrow.")
    ] = None,
    kl_until: Annotated[int | None, typer.Option(min=1, help="Switch the KL off at this step (from 0).")] = None,
    interleave: Annotated[
        float, typer.Option(min=0, help="Share of --retain conversations mixed into the training data.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations per step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; default 0.1 for a vector, 0.003 for lora.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's weight decay.")] = 0.0,
    seed: SeedOption = 0,
    out: OutOption = Path("direction_out"),
    split: SplitOption = "train",
    system: SystemOption = "default",
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    attn: AttnOption = None,
    quantize: QuantizeOption = None,
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a steering vector or a LoRA adapter: the general solution, or with --retain and --kl a narrow one."""
    from piggyback_lens.finetuning.training import TrainSettings
    from piggyback_lens.jobs.direction_settings import LEARNING_RATES, TrainDirectionSettings
    from piggyback_lens.jobs.job_inputs import layer_numbers, read_data, read_retain
    from piggyback_lens.tasks import TASKS

    if layer is not None and layers is not None:
        raise LensError("--layer and --layers are both given: choose one")
    if kind is SolutionName.vector and (rank is not None or modules is not None):
        raise LensError("--rank and --modules belong to --kind lora")
    if kind is SolutionName.lora and site != "resid_post":
        raise LensError("--site belongs to --kind vector: an adapter acts at its --modules")
    training = TrainSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=LEARNING_RATES[kind.value] if learning_rate is None else learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    where = (layer,) if layer is not None else None if layers is None else layer_numbers(layers)
    names = tuple(name.strip() for name in (modules or "down").split(","))
    settings = TrainDirectionSettings(
        training,
        kind=kind.value,
        layers=where,
        site=site,  # type: ignore[arg-type]
        rank=rank or 1,
        modules=names,  # type: ignore[arg-type]
        kl=kl,
        kl_until=kl_until,
        interleave=interleave,
    )
    rows = read_data(data, split=split, offline=offline)
    held_out = read_data(data, split="validation") if data in TASKS and split == "train" else []
    kept = read_retain(retain) if retain is not None else []
    settings.check_data(len(rows), len(kept))
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    source, chat = _chat(base, system, options)
    examples, validation, retained = ([chat.render(row) for row in part] for part in (rows, held_out, kept))

    from piggyback_lens.jobs.direction_jobs import train_direction_job

    model = _model(source, chat, BackendName.bridge, options)
    into: dict[str, Any] = {"retain": retained, "validation": validation, "out": out, "name": _shown(source)}
    done = train_direction_job(model, examples, settings, **into)
    tell(done.verdict, ("solution", done.path), ("report", out / "report.html"))


def curves(
    base: BaseArgument,
    solution: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, repeatable: a direction, a folder of train-direction, a PEFT adapter folder, or a vector "
            "in .gguf, .npy or .pt; PATH@15 for a layer."
        ),
    ],
    data: DataOption,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="efficiency, stability, significance (default all three), ablation; repeatable."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Plain text: a file or a hub dataset; default Python's own help texts.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Use the first N conversations.")] = 24,
    n_texts: Annotated[int, typer.Option(min=2, help="Windows of plain text.")] = 16,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 64,
    fractions: Annotated[
        str | None, typer.Option(help="Norms as fractions of each solution's own; default 0,0.25 ... 2.")
    ] = None,
    epsilons: Annotated[str | None, typer.Option(help="Shares of noise; default 0,0.1 ... 1.")] = None,
    n_random: Annotated[
        int | None, typer.Option(min=0, help="Random controls per point; default 3, on plain text 5.")
    ] = None,
    n_noise: Annotated[int, typer.Option(min=1, help="Noise draws per point.")] = 3,
    noise_on: Annotated[NoiseName, typer.Option(help="Matrices of an adapter that get noise.")] = NoiseName.both,
    rows_per_pass: Annotated[int, typer.Option(min=1, help="Rows per pass; bounds the memory.")] = 32,
    seed: SeedOption = 0,
    out: OutOption = Path("curves_out"),
    split: SplitOption = "train",
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
    """Draw efficiency, stability, significance and ablation of solutions, beside norm-matched random controls."""
    from piggyback_lens.jobs.direction_settings import TEXT_KINDS, CurveSettings
    from piggyback_lens.jobs.job_inputs import as_direction, named_solutions, numbers, read_data

    given: dict[str, Any] = {"kinds": tuple(kind)} if kind else {}
    given |= {} if fractions is None else {"fractions": numbers(fractions, "--fractions")}
    given |= {} if epsilons is None else {"epsilons": numbers(epsilons, "--epsilons")}
    given |= {"n_random": n_random, "n_noise": n_noise, "noise_on": noise_on.value, "seed": seed}
    settings = CurveSettings(**given, rows_per_pass=rows_per_pass)
    solutions = named_solutions(solution)
    if "ablation" in settings.kinds:
        for own in solutions.values():
            as_direction(own)  # refuses what has no direction
    rows = read_data(data, split=split, offline=offline)[:n]
    if text is not None and offline and not Path(text).is_file():
        raise LensError(f"text {text} is no file here, and offline was asked: give a text file, or leave --text out")
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    source, chat = _chat(base, system, options)
    prompts, texts = [chat.render(row) for row in rows], []
    if set(settings.kinds) & set(TEXT_KINDS):
        from piggyback_lens.measuring.texts import text_windows

        texts = text_windows(chat.tokenizer, text, n=n_texts, length=text_tokens, seed=seed)

    from piggyback_lens.jobs.direction_jobs import curves_job
    from piggyback_lens.jobs.direction_reports import curves_verdict

    model = _model(source, chat, backend, options)
    into: dict[str, Any] = {"out": out, "tokenizer": chat.tokenizer, "name": _shown(source)}
    found = curves_job(model, solutions, prompts, texts, settings, **into)
    tell(curves_verdict(found, list(solutions)), ("report", out / "report.html"))


def steer(
    base: BaseArgument,
    direction: Annotated[
        str,
        typer.Option(
            help="A direction, a folder of train-direction, a rank-1 PEFT adapter folder, or a vector in .gguf, .npy "
            "or .pt; PATH@15 for a layer."
        ),
    ],
    prompts: Annotated[Path | None, typer.Option(help="Prompts to steer on: .txt, .jsonl or .json.")] = None,
    behaviour: Annotated[
        str | None, typer.Option(help="words, refusal, abstention, tool_call, phrase:TEXT or regex:PATTERN.")
    ] = None,
    strengths: Annotated[str | None, typer.Option(help="Multiples of the vector; default 0,1,2,4.")] = None,
    fractions: Annotated[
        str | None, typer.Option(help="Instead: lengths as fractions of the mean activation norm, 0.1,0.5.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to try, one at a time: 3,5,10-20; default the direction's own.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Instead of a sweep: answer the prompts typed or piped in, base and steered.")
    ] = False,
    n: Annotated[int, typer.Option("--n", min=2, help="Use the first N prompts.")] = 12,
    n_random: Annotated[int, typer.Option(min=0, help="Random directions per point.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 16,
    seed: SeedOption = 0,
    out: OutOption = Path("steer_out"),
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
    """Steer with a direction at several strengths and layers, beside random ones; or chat with it (--chat)."""
    from piggyback_lens.jobs.direction_settings import SteerSettings
    from piggyback_lens.jobs.job_inputs import as_direction, layer_numbers, numbers, read_solution
    from piggyback_lens.measuring.measures import get_behaviour
    from piggyback_lens.tasks import load_prompts

    vector = as_direction(read_solution(direction))
    options = load_options(dtype, device, offline, attn, quantize, trust_remote_code)
    if chat:
        sweep = {"--prompts": prompts, "--behaviour": behaviour, "--strengths": strengths, "--fractions": fractions}
        if given := [name for name, value in {**sweep, "--layers": layers}.items() if value is not None]:
            raise LensError(f"{', '.join(given)} belong to a sweep: --chat takes :strength X and :layer N as lines")
        source, rendering = _chat(base, system, options)
        _talk(_model(source, rendering, backend, options), rendering, vector, max_new_tokens)
        return
    if prompts is None or behaviour is None:
        raise LensError("give --prompts and --behaviour for a sweep, or --chat to talk to the steered model")
    if strengths is not None and fractions is not None:
        raise LensError("--strengths and --fractions are both given: choose one")
    sizes: dict[str, Any] = {}
    if fractions is not None:
        sizes = {"strengths": None, "fractions": numbers(fractions, "--fractions")}
    elif strengths is not None:
        sizes = {"strengths": numbers(strengths, "--strengths")}
    settings = SteerSettings(
        **sizes,
        layers=None if layers is None else layer_numbers(layers),
        n_random=n_random,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    measure, chosen = get_behaviour(behaviour), load_prompts(prompts)[:n]
    source, rendering = _chat(base, system, options)
    rendered = [rendering.render(prompt) for prompt in chosen]

    from piggyback_lens.jobs.direction_jobs import steer_job

    model = _model(source, rendering, backend, options)
    result = steer_job(model, vector, rendered, measure, settings, out=out, name=_shown(source))
    tell(result.verdict, ("report", out / "report.html"))


# ---------------------------------------------------------------- the base, and a chat


def _chat(base: str, system: str, options: "LoadOptions") -> "tuple[str, ChatFormat]":
    """Where the base is, and its chat format: all that can be checked before the weights are loaded."""
    from piggyback_lens.conversations.chat import ChatFormat
    from piggyback_lens.models.sources import default_model, load_tokenizer

    source = default_model(offline=options.offline) if base == "demo" else base
    return source, ChatFormat(load_tokenizer(source, options), system=system)


def _model(source: str, chat: "ChatFormat", backend: BackendName, options: "LoadOptions") -> Any:
    from piggyback_lens.models.pair import hook_model
    from piggyback_lens.models.sources import load_causal_lm

    loaded = load_causal_lm(source, options)
    return hook_model(loaded, chat.tokenizer, backend=backend.value, name=_shown(source))


def _shown(source: str) -> str:
    """A name for reports: of a folder its last part, without what the conversion of a GGUF file appends."""
    return Path(source).name.split(".Q")[0] if Path(source).exists() else source


def _talk(model: Any, chat: "ChatFormat", vector: Any, max_new_tokens: int) -> None:
    from piggyback_lens.jobs.steer_chat import HELP, talk

    typer.echo(HELP, err=True)
    talk(model, chat, vector, _lines(), typer.echo, max_new_tokens=max_new_tokens)


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
