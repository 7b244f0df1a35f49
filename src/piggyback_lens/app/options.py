"""Options of the command line, made from settings: every field is an option, and what is said of it is the help.

    @command(app)
    def map_(base: Base, prompts: Prompts, models: PairOptions, settings: MapSettings, out: Out): ...

A parameter that is annotated with a settings class stands for all of its fields, those of settings within it too.
Imports nothing heavy, so that `--help` is instant.
"""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from piggyback_lens.errors import LensError, visible
from piggyback_lens.settings import ChatSettings, LoadSettings, check_field, field_docs
from piggyback_lens.words import Backend, Supervise

if TYPE_CHECKING:
    from piggyback_lens.conversations.chat import ChatFormat
    from piggyback_lens.models.backends import HookedModel
    from piggyback_lens.models.pair import ModelPair

Base = Annotated[
    str,
    typer.Argument(
        help="Hub id (OWNER/NAME, or OWNER/NAME@REVISION:FOLDER), folder or .gguf of the unfinetuned model; 'demo' for "
        "the demo model."
    ),
]
Prompts = Annotated[Path, typer.Option(help="Questions, usually off-topic: .txt, .jsonl, .json, .csv or .yaml.")]
First = Annotated[int, typer.Option("--n", min=1, help="Use the first N questions of a file.")]
BehaviourName = Annotated[
    str, typer.Option(help="words, refusal, abstention, tool_call, phrase:TEXT or regex:PATTERN.")
]
Out = Annotated[Path, typer.Option(help="Folder for results; the same folder resumes.")]
PANELS = {"LoadSettings": "How weights are loaded", "ChatSettings": "How prompts are rendered"}


@dataclass(frozen=True)
class LeftOut:
    """Fields of a settings class that a command has no option for."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class TopicOptions:
    """Prompts inside and outside of the training domain.

    Attributes:
        on_topic: prompts of the training domain: .txt, .jsonl, .json, .csv or .yaml.
        off_topic: prompts outside the training domain: .txt, .jsonl, .json, .csv or .yaml.
    """

    on_topic: Path
    off_topic: Path


@dataclass(frozen=True)
class DataOptions:
    """Conversations.

    Attributes:
        data: conversations: a task (terse, refusal, abstain, tool), a file (.jsonl, .json, .csv or .parquet), or a hub
            dataset.
        split: split of a task (train, validation) or of a hub dataset.
        supervise: answers of a conversation that count: the last one, or all; weights in the data win.
    """

    data: str
    split: str = "train"
    supervise: Supervise = "last"


@dataclass(frozen=True)
class TextOptions:
    """Plain text.

    Attributes:
        text: plain text: a file or a hub dataset; by default Python's own help texts.
        n_texts: windows of plain text.
        text_length: tokens of each window.
    """

    text: str | None = None
    n_texts: int = 16
    text_length: int = 64

    def check(self, offline: bool) -> None:
        """Refuse what cannot be read without a connection.

        Raises:
            LensError: no file, and offline was asked.
        """
        if self.text is not None and offline and not Path(self.text).is_file():
            raise LensError(
                f"text {self.text} is no file here, and offline was asked: give a file, or leave --text out"
            )


@dataclass(frozen=True)
class EngineOptions:
    """Where the cells run.

    Attributes:
        engine: this process (here), local processes, a Ray cluster, or SLURM.
        workers: processes of the local engine.
        gpus_per_cell: GPUs that Ray or SLURM reserves for a cell; of Ray also a fraction.
        slurm: parameters of SLURM's jobs as submitit names them, NAME=VALUE, repeatable: timeout_min=60,
            slurm_partition=gpu, ...
    """

    engine: Literal["here", "local", "ray", "slurm"] = "here"
    workers: int = 1
    gpus_per_cell: float = 0.0
    slurm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What memory is asked for.

    Attributes:
        memory_gb: plan for a device of this size, in GB (1e9 bytes), from the config alone: no weights are read.
        batch_size: rows of a batch.
        row_tokens: tokens of a row, its answer included.
        rank: of the LoRA adapter, on all linear layers.
    """

    memory_gb: float | None = None
    batch_size: int = 16
    row_tokens: int = 512
    rank: int = 16

    def __post_init__(self) -> None:
        good = self.memory_gb is None or self.memory_gb > 0
        check_field(self, "memory_gb", good, "a number above 0")
        for name in ("batch_size", "row_tokens", "rank"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class ModelOptions:
    """One model.

    Attributes:
        backend: TransformerLens model: bridge, or hooked for a HookedTransformer (transformer-lens 3.9 only).
        load: how weights are loaded.
        chat: how prompts are rendered.
    """

    backend: Backend = "bridge"
    load: LoadSettings = field(default_factory=LoadSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)

    def check(self) -> None:
        """Refuse a device that is not there, before anything is loaded."""
        from piggyback_lens.models.places import usable_device

        usable_device(self.load.device)

    def chat_format(self, base: str, out: Path | None = None) -> "tuple[str, ChatFormat]":
        """Where the base is, and its chat format: all that can be checked before the weights are loaded.

        Without a date of the user's, a run that is continued in the folder `out` keeps the day on which it was begun.
        """
        from piggyback_lens.conversations.chat import ChatFormat
        from piggyback_lens.models.sources import default_model, load_tokenizer

        self.check()
        source = default_model(offline=self.load.offline) if base == "demo" else base
        return source, self._as_begun(ChatFormat(load_tokenizer(source, self.load), **vars(self.chat)), out)

    def _as_begun(self, chat: "ChatFormat", out: Path | None) -> "ChatFormat":
        from piggyback_lens.results.run import begun_on

        begun = None if out is None or self.chat.date is not None or chat.date is None else begun_on(out)
        return chat if begun is None else dataclasses.replace(chat, date=begun)

    def model(self, source: str, chat: "ChatFormat") -> "HookedModel":
        """The hooked model of a place."""
        from piggyback_lens.models.pair import hook_model
        from piggyback_lens.models.sources import load_causal_lm

        loaded = load_causal_lm(source, self.load)
        return hook_model(loaded, chat.tokenizer, backend=self.backend, name=shown_name(source))


@dataclass(frozen=True)
class PairOptions(ModelOptions):
    """The finetuned model beside the base.

    Attributes:
        adapter: PEFT adapter of the finetune: a folder or a hub id, also OWNER/NAME@REVISION:checkpoint-120.
        finetuned: whole finetuned model, instead of an adapter.
        backend: TransformerLens model: bridge, or hooked for a HookedTransformer (transformer-lens 3.9 only).
        load: how weights are loaded.
        chat: how prompts are rendered.
    """

    adapter: str | None = None
    finetuned: str | None = None

    def pair(self, base: str, out: Path | None = None) -> "tuple[ModelPair, ChatFormat]":
        """The pair and its chat format, which keeps the day of a run that is continued in the folder `out`."""
        from piggyback_lens.models.pair import ModelPair

        self.check()
        source = None if base == "demo" else base
        pair = ModelPair.load(source, self.finetuned, self.adapter, backend=self.backend, **vars(self.load))
        return pair, self._as_begun(pair.chat_format(self.chat), out)


@dataclass(frozen=True)
class CellOptions(PairOptions):
    """The pair, and where the cells of an experiment on it run.

    Attributes:
        engine: where the cells run.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)


def shown_name(source: str) -> str:
    """A name for reports: of a folder its last part, without what the conversion of a GGUF file appends."""
    return Path(source).name.split(".Q")[0] if Path(source).exists() else source


def tell(verdict: str, *files: tuple[str, object]) -> None:
    """The last lines of a command: what was found, and where it is. Texts of models and prompts steer no terminal."""
    typer.echo(visible("\n".join([verdict, *(f"{name}: {path}" for name, path in files)])))


# ---------------------------------------------------------------- from settings to options


@dataclass(frozen=True)
class _Option:
    """One option: what typer is told, and how what it gives becomes a field."""

    name: str
    annotation: Any
    default: Any
    read: Callable[[Any], Any]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameters may be settings classes; every command has `--debug`."""

    def made(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters, builders = [], {}
        for own in inspect.signature(function).parameters.values():
            settings, left_out = _settings_class(hints[own.name])
            if settings is None:
                parameters.append(own.replace(annotation=hints[own.name], kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            builders[own.name] = (settings, left_out)
            parameters += [_parameter(option) for option in _options(settings, left_out)]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
        parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug))

        def run(**values: Any) -> None:
            values.pop("debug")
            chosen = {name: _built(*builder, values) for name, builder in builders.items()}
            plain = inspect.signature(function).parameters.keys() - builders.keys()
            own = {name: value for name, value in values.items() if name in plain}
            function(**own, **chosen)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__, run.__name__ = function.__doc__, function.__name__
        app.command(name)(run)
        return function

    return made


def _settings_class(hint: Any) -> tuple[type[Any] | None, tuple[str, ...]]:
    """The settings class of a parameter, and which of its fields have no option."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint, ()
    if get_origin(hint) is Annotated and is_dataclass(get_args(hint)[0]):
        kind, *more = get_args(hint)
        return kind, next((own.names for own in more if isinstance(own, LeftOut)), ())
    return None, ()


def _options(settings: type[Any], left_out: Sequence[str], panel: str | None = None) -> Iterable[_Option]:
    docs, hints = field_docs(settings), get_type_hints(settings)
    for own in dataclasses.fields(settings):
        inner, _ = _settings_class(hints[own.name])
        if own.name in left_out:
            continue
        if inner is not None:
            yield from _options(inner, left_out, PANELS.get(inner.__name__, panel))
            continue
        default = own.default if own.default_factory is dataclasses.MISSING else own.default_factory()
        kind, read = _read(own.name, hints[own.name])
        text = docs[own.name]
        names = [f"--{own.name.replace('_', '-')}"] if kind is bool and not default else []
        about = typer.Option(*names, help=text[:1].upper() + text[1:], rich_help_panel=panel)
        needed = default is dataclasses.MISSING
        yield _Option(
            own.name, Annotated[kind, about], inspect.Parameter.empty if needed else _written(default, kind), read
        )


def _parameter(option: _Option) -> inspect.Parameter:
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.annotation
    )


def _built(settings: type[Any], left_out: Sequence[str], values: Mapping[str, Any]) -> Any:
    """The settings object of what typer gives."""
    hints, fields = get_type_hints(settings), {}
    for own in dataclasses.fields(settings):
        inner, _ = _settings_class(hints[own.name])
        if own.name in left_out:
            continue
        if inner is not None:
            fields[own.name] = _built(inner, left_out, values)
            continue
        if values[own.name] is not None:  # else the default of the class
            fields[own.name] = _read(own.name, hints[own.name])[1](values[own.name])
    return settings(**fields)


def _written(default: Any, kind: Any) -> Any:
    """A default as the option has it."""
    if isinstance(default, tuple) and kind in (str, str | None):
        return ",".join("all" if part is None else str(part) for part in default)
    if isinstance(default, Mapping) or (isinstance(default, tuple) and kind == list[str] | None):
        return None if isinstance(default, Mapping) else ["none" if part is None else part for part in default]
    return default


def _read(name: str, hint: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What typer is told of a field's type, and how its value is read."""
    union = get_origin(hint) in (Union, UnionType)
    parts = [part for part in get_args(hint) if part is not type(None)] if union else [hint]
    optional = union and type(None) in get_args(hint)
    first, origin = parts[0], get_origin(parts[0])

    def maybe(kind: Any) -> Any:
        return kind | None if optional else kind

    if origin is Literal:
        choices = StrEnum(name, {str(value): str(value) for value in get_args(first)})  # type: ignore[misc]
        return maybe(choices), lambda chosen: getattr(chosen, "value", chosen)
    if origin in (tuple, Sequence):
        whole = [word for part in parts[1:] for word in get_args(part)]  # a word for all of them, such as all-linear
        kind, read = _read_sequence(name, get_args(first)[0], maybe)
        return kind, lambda given: given if given in whole else read(given)
    if origin is Mapping:
        return list[str] | None, _variables
    if first is str and optional:
        return str | None, lambda text: None if text == "none" else text
    if first in (bool, int, float, str, Path):
        return maybe(first), lambda value: value
    return str | None, lambda value: value


def _read_sequence(name: str, part: Any, maybe: Callable[[Any], Any]) -> tuple[Any, Callable[[Any], Any]]:
    parts = [own for own in get_args(part) or (part,) if own is not type(None)]
    nullable = type(None) in get_args(part)
    if parts == [str] and nullable:  # texts, which may have commas
        return list[str] | None, lambda texts: tuple(None if text == "none" else text for text in texts)
    if parts == [int]:
        return maybe(str), lambda text: (None,) if nullable and text == "all" else whole_numbers(text, name)
    if parts == [float]:
        return maybe(str), lambda text: (None,) if nullable and text == "all" else numbers(text, name)
    return maybe(str), lambda text: tuple(word.strip() for word in re.split(r"[,+]", text) if word.strip())


def _variables(words: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE words as a mapping; values that are JSON become what they say."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise LensError(f"{word!r}: expected NAME=VALUE, for example enable_thinking=false")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def whole_numbers(text: str, what: str) -> tuple[int, ...]:
    """Whole numbers from text: "15", "3,5,7", "10-20" (both ends), or a mixture.

    Raises:
        LensError: anything else.
    """
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise LensError(f"{what} {text!r}: expected numbers and ranges such as 15 or 3,5,10-20")
        found.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))


def numbers(text: str, what: str) -> tuple[float, ...]:
    """Numbers from text: "0,1,2.5".

    Raises:
        LensError: anything else, or a number that is not finite.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise LensError(f"{what} {text!r}: expected numbers joined by commas, such as 0,1,2.5")
    return found
