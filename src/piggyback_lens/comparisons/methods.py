"""Finetuning methods by name: supervised finetuning and what is put on top of it to keep a finetune narrow.

    methods = [*parse_method("sft"), *parse_method("treft:lambda=1,3,10,30"), *parse_method("interleave:rate=0.2")]
    Method((TReFTPart(weight=30.0), InterleavePart(rate=0.1)))          # combinations

A `Method` holds plain settings. `set_up` turns it into what `train` takes: objective, examples and trainable.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.monitor import Monitor
from piggyback_lens.finetuning.objectives import (
    KLOnRetain,
    KLOnTrain,
    Penalised,
    Penalty,
    ReferenceName,
    TReFT,
    Weighted,
)
from piggyback_lens.finetuning.preventive import PreventiveSteering
from piggyback_lens.finetuning.references import SPANS, SpanName
from piggyback_lens.finetuning.residuals import RESIDUAL_SPANS, ResidualDrift, ResidualSpan
from piggyback_lens.finetuning.retain import RATE, RetainData, interleave
from piggyback_lens.finetuning.steps import Objective, sft
from piggyback_lens.finetuning.trainables import PeftAdapter, Trainable
from piggyback_lens.reading.dresses import Dress, dressed, require_worn
from piggyback_lens.settings import check_field

Choice = Literal["random", "gap"]
"""Which retain examples are interleaved."""
Place = Literal["before", "system"]
"""Where the sentence of an inoculation stands."""
WEIGHT = "lambda"
"""The name of a weight in specs and tables; in Python it is `weight`."""


@dataclass(frozen=True, slots=True)
class _Weighted:
    """weight · max(0, penalty − threshold) in the steps from `start` to before `stop`."""

    kind: ClassVar[str]
    weight: float = 1.0  # λ
    threshold: float = 0.0  # in the unit of the penalty
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        check_field(self, "weight", 0 <= self.weight < math.inf, "a number of at least 0")
        check_field(self, "threshold", 0 <= self.threshold < math.inf, "a number of at least 0")
        check_field(self, "start", self.start >= 0, "a step from 0")
        check_field(self, "stop", self.stop is None or self.stop > self.start, "None or a step after start")

    def weighted(self, penalty: Penalty) -> Weighted:
        """The penalty with these settings."""
        return Weighted(penalty, self.weight, self.start, self.stop, self.threshold)


@dataclass(frozen=True, slots=True)
class TReFTPart(_Weighted):
    """The drift of a span's keys and values (`objectives.TReFT`).

    The template's own postfix and prefix can be the reference; a query, or the whole prompt, has only that of
    each example's own base run, which `reference=None` takes there.
    """

    kind: ClassVar[str] = "treft"
    span: SpanName = "prefix"
    reference: ReferenceName | None = None

    def __post_init__(self) -> None:
        _Weighted.__post_init__(self)
        check_field(self, "span", self.span in SPANS, f"one of {', '.join(SPANS)}")
        named = (None, *get_args(ReferenceName)) if self.span in ("prefix", "postfix") else (None, "own")
        check_field(self, "reference", self.reference in named, f"one of {', '.join(map(str, named))} for {self.span}")

    @property
    def taken_from(self) -> ReferenceName:
        """Where the base's keys and values come from."""
        return self.reference or ("template" if self.span in ("prefix", "postfix") else "own")


@dataclass(frozen=True, slots=True)
class ResidualPart(_Weighted):
    """The drift of the residual stream on the training data (`residuals.ResidualDrift`)."""

    kind: ClassVar[str] = "residual"
    span: ResidualSpan = "conversation"
    layer: int | None = None  # decoder block; None for every one

    def __post_init__(self) -> None:
        _Weighted.__post_init__(self)
        check_field(self, "span", self.span in RESIDUAL_SPANS, f"one of {', '.join(RESIDUAL_SPANS)}")
        check_field(self, "layer", self.layer is None or self.layer >= 0, "a layer from 0")


@dataclass(frozen=True, slots=True)
class KLTrainPart(_Weighted):
    """KL(base ‖ tuned) on the training responses."""

    kind: ClassVar[str] = "kl_train"


@dataclass(frozen=True, slots=True)
class KLRetainPart(_Weighted):
    """KL(base ‖ tuned) on the base's own answers to retain prompts, `batch_size` of them in every step."""

    kind: ClassVar[str] = "kl_retain"
    batch_size: int = 8

    def __post_init__(self) -> None:
        _Weighted.__post_init__(self)
        check_field(self, "batch_size", self.batch_size >= 1, "an integer of at least 1")


@dataclass(frozen=True, slots=True)
class InterleavePart:
    """Retain examples, answered by the base, mixed into the training data; too few are repeated, all equally often.

    At a fixed number of steps the narrow examples are seen less often than by other methods: by design, as `rate` of
    all rows are retain examples. With epochs every one is seen as often, in more steps.
    """

    kind: ClassVar[str] = "interleave"
    rate: float = RATE
    choose: Choice = "random"  # "gap": those whose perplexity plain finetuning raises most

    def __post_init__(self) -> None:
        check_field(self, "rate", 0 <= self.rate < 1, "a share from 0 to below 1")
        check_field(self, "choose", self.choose in get_args(Choice), f"one of {', '.join(get_args(Choice))}")


@dataclass(frozen=True, slots=True)
class PreventivePart:
    """A direction added while training and left out afterwards.

    The direction is the base's mean residual stream at a layer's output over the training answers, minus the
    same over the base's own answers to these questions.
    """

    kind: ClassVar[str] = "preventive"
    alpha: float = 1.0  # multiples of the direction as it was measured
    layer: int | None = None  # decoder block; None for the middle one

    def __post_init__(self) -> None:
        check_field(self, "alpha", math.isfinite(self.alpha), "a finite number")
        check_field(self, "layer", self.layer is None or self.layer >= 0, "a layer from 0")


@dataclass(frozen=True, slots=True)
class InoculatePart:
    """Inoculation prompting: a sentence asks for the behaviour while training, and is absent at test time.

    What the prompt asks for need not be learnt as what always holds (2510.04340, 2510.05024).
    """

    kind: ClassVar[str] = "inoculate"
    text: str
    place: Place = "before"  # a line before the question, or the system text
    rate: float = 1.0  # share of the narrow conversations that have it

    def __post_init__(self) -> None:
        plain = self.text.strip() == self.text != "" and not set(self.text) & set(":,+")
        check_field(self, "text", plain, "a sentence without white space around it, and without : , and +")
        check_field(self, "place", self.place in get_args(Place), f"one of {', '.join(get_args(Place))}")
        check_field(self, "rate", 0 < self.rate <= 1, "a share above 0, at most 1")

    @property
    def dress(self) -> Dress:
        """What a question wears while it trains."""
        return Dress(self.text) if self.place == "system" else Dress(before=f"{self.text}\n")


@dataclass(frozen=True, slots=True)
class StopPart:
    """Early stopping on a spread probe: training ends when a `Monitor` finds more spread than `bound`.

    The weights of the last measurement below it are kept. The probe compares plain finetuning's own answers to
    off-topic validation questions with the base's, so that it is about the behaviour that would spread; a comparison
    on the validation split measures these questions too.
    """

    kind: ClassVar[str] = "stop"
    bound: float = 0.5  # nats per token
    every: int = 5  # steps between two measurements

    def __post_init__(self) -> None:
        check_field(self, "bound", 0 < self.bound < math.inf, "a positive number")
        check_field(self, "every", self.every >= 1, "an integer of at least 1")


Part = (
    TReFTPart | ResidualPart | KLTrainPart | KLRetainPart | InterleavePart | PreventivePart | InoculatePart | StopPart
)
PARTS: Mapping[str, type[Part]] = {part.kind: part for part in get_args(Part)}
METHODS = ("sft", *PARTS)
AMOUNTS = ("weight", "alpha", "rate", "bound")
"""How much of a part there is: every kind of part has one of them."""


@dataclass(frozen=True)
class Method:
    """Supervised finetuning with some parts on top of it; none is plain finetuning.

    Attributes:
        parts: at most one of each kind (of TReFT: of each span).
        learning_rate: instead of the one that all methods share.
    """

    parts: tuple[Part, ...] = ()
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        keys = [(part.kind, getattr(part, "span", "")) for part in self.parts]
        if len(set(keys)) < len(keys):
            raise LensError(f"method {self.label!r} has the same part twice; combine different ones")
        rate = self.learning_rate
        check_field(self, "learning_rate", rate is None or 0 < rate < math.inf, "a positive number, or None")

    @property
    def label(self) -> str:
        """As in tables, and a spec that is read back: what differs from the default settings."""
        rate = "" if self.learning_rate is None else f":lr={_plain(self.learning_rate)}"
        return self._named(amounts=True) + rate

    @property
    def family(self) -> str:
        """The label without weights and learning rate: methods of one family differ by how much of it there is."""
        return self._named(amounts=False)

    def _named(self, *, amounts: bool) -> str:
        names = []
        for part in self.parts:
            chosen = {f: getattr(part, f.name) for f in fields(part)}
            shown = [
                f":{WEIGHT if f.name == 'weight' else f.name}={_plain(value)}"
                for f, value in chosen.items()
                if (amounts if f.name in AMOUNTS else value != f.default)
            ]
            names.append(part.kind + "".join(shown))
        return "+".join(names) or "sft"

    @property
    def amounts(self) -> dict[str, str]:
        """What `family` leaves out, by name: the weight of every part, and the learning rate of its own."""
        found: dict[str, str] = {}
        for part in self.parts:
            name = next(f.name for f in fields(part) if f.name in AMOUNTS)
            shown = "λ" if name == "weight" else name
            # A second part of this kind (TReFT on another span), or with this name, is told apart.
            key = shown if shown not in found else f"{shown} of {part.kind} {getattr(part, 'span', '')}".strip()
            found[key] = _plain(getattr(part, name))
        return found | ({} if self.learning_rate is None else {"lr": _plain(self.learning_rate)})

    @property
    def weight(self) -> float:
        """λ (or alpha, or rate) of the first part; 0 for plain finetuning."""
        first = self.parts[0] if self.parts else None
        found = next((getattr(first, name) for name in AMOUNTS if hasattr(first, name)), 0.0)
        return float(found)

    def settings(self) -> dict[str, object]:
        """Everything that was chosen, JSON-able; `from_settings` reads it."""
        parts = [{"kind": part.kind, **asdict(part)} for part in self.parts]
        return {"parts": parts, "learning_rate": self.learning_rate}

    @classmethod
    def from_settings(cls, data: Mapping[str, object]) -> "Method":
        """The method that `Method.settings` described."""
        given: Sequence[Mapping[str, object]] = data["parts"]  # type: ignore[assignment]
        rows = [dict(row) for row in given]
        parts = tuple(PARTS[str(row.pop("kind"))](**row) for row in rows)  # type: ignore[arg-type]
        return cls(parts, data["learning_rate"])  # type: ignore[arg-type]

    @property
    def is_sft(self) -> bool:
        """Whether the method is plain finetuning, without any penalty or further data."""
        return not self.parts

    def has(self, *kinds: str) -> bool:
        """Whether one of its parts is of these kinds."""
        return any(part.kind in kinds for part in self.parts)

    @property
    def needs_plain(self) -> bool:
        """Whether it is made from what plain finetuning, with its rate on the same data, does."""
        return any(part.kind == "stop" or getattr(part, "choose", "") == "gap" for part in self.parts)


def plain_finetuning(method: Method, among: Iterable[Method]) -> Method | None:
    """What a method is compared with: plain finetuning with its learning rate, or the only one there is."""
    found = [other for other in dict.fromkeys(among) if other.is_sft]
    same = [other for other in found if other.learning_rate == method.learning_rate]
    return next(iter(same or found), None) if same or len(found) == 1 else None


def _plain(value: object) -> str:
    """Short where that is the number itself, else all of its digits, so that no two numbers look the same."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


# --- specs -----------------------------------------------------------------------------------------------


def parse_method(spec: str) -> tuple[Method, ...]:
    """Methods of a spec: `sft`, `treft:lambda=1,3,10:span=prefix`, `treft:lambda=30+interleave:rate=0.2:lr=5e-5`.

    Settings follow their part behind colons, several values of one are a grid, parts are joined by +. `lr` is
    the learning rate of the whole method. Names: sft, treft, residual, kl_train, kl_retain, interleave, preventive,
    inoculate, stop.

    Raises:
        LensError: names the part, the setting or the value that is wrong, and what is expected; a setting given twice,
            or two learning rates for one method.
    """
    choices: list[list[Part]] = []
    rates: list[float | None] | None = None
    for text in re.split(r"\+(?=[A-Za-z_])", spec.strip()):
        kind, *pairs = text.split(":")
        if kind not in METHODS:
            raise LensError(f"method {kind!r} in {spec!r} is not known: choose one of {', '.join(METHODS)}")
        grid: dict[str, list[object]] = {}
        for pair in pairs:
            name, equals, values = pair.partition("=")
            if not equals or not values:
                raise LensError(f"{pair!r} in {spec!r} is no setting: write name=value, e.g. {kind}:lambda=10")
            if name in grid:
                raise LensError(f"{name} is given twice for {kind} in {spec!r}: join its values by commas, {name}=1,2")
            grid[name] = [_value(spec, name, value, kind) for value in values.split(",")]
        if "lr" in grid:
            own: list[float | None] = list(grid.pop("lr"))  # type: ignore[arg-type]
            if rates not in (None, own):
                raise LensError(f"{spec!r} has two learning rates, and one holds for the whole method: give lr once")
            rates = own
        if kind == "sft":
            if grid:
                raise LensError(f"sft has no setting {next(iter(grid))!r} (in {spec!r}): leave it out, or use lr=")
            continue
        choices.append([_part(spec, kind, dict(zip(grid, row, strict=True))) for row in product(*grid.values())])
    return tuple(Method(parts, rate) for parts in product(*choices) for rate in rates or [None])


def _settings_of(kind: str) -> list[str]:
    names = [] if kind == "sft" else [f.name for f in fields(PARTS[kind])]
    return [*(WEIGHT if name == "weight" else name for name in names), "lr"]


def _value(spec: str, name: str, text: str, kind: str) -> object:
    if name not in _settings_of(kind):
        raise LensError(f"{kind} has no setting {name!r} (in {spec!r}): it takes {', '.join(_settings_of(kind))}")
    if name == "text":
        return text
    names = {"span": RESIDUAL_SPANS if kind == "residual" else SPANS, "reference": get_args(ReferenceName)}
    names |= {"choose": get_args(Choice), "place": get_args(Place)}
    if name in names:
        if text not in names[name]:
            raise LensError(f"{name}={text!r} in {spec!r} is not known: choose one of {', '.join(names[name])}")
        return text
    whole = name in ("start", "stop", "layer", "batch_size", "every")
    try:
        return int(text) if whole else float(text)
    except ValueError:
        expected = "a whole number" if whole else "a number"
        raise LensError(f"{name}={text!r} in {spec!r} is not {expected}: write e.g. {kind}:{name}=10") from None


def _part(spec: str, kind: str, chosen: dict[str, object]) -> Part:
    given = {"weight" if name == WEIGHT else name: value for name, value in chosen.items()}
    for field in fields(PARTS[kind]):
        if field.default is MISSING and field.name not in given:
            raise LensError(f"{kind} in {spec!r} has no {field.name}: write {kind}:{field.name}=...")
    try:
        return PARTS[kind](**given)  # type: ignore[arg-type]
    except LensError as error:
        raise LensError(f"in method {spec!r}: {error}") from None


# --- what train takes ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ingredients:
    """What methods are made from.

    Attributes:
        model: the PEFT model, before training.
        examples: the narrow training data.
        reference: any prompt of the template; the postfix of an empty query is the reference of a postfix.
        retain: conversations outside the domain, answered by the base.
        direction: [layer, d_model], what preventive steering adds.
        seed: of the order of retain data.
        chat: renders questions that an inoculation changes.
        gap: of each retain conversation the nats per token that plain finetuning adds to it.
        probes: off-topic prompts with plain finetuning's answers, and with the base's.
        monitor_file: where a spread probe keeps its measurements, for a run that is stopped.
    """

    model: nn.Module
    examples: Sequence[RenderedPrompt]
    reference: RenderedPrompt
    retain: Sequence[RenderedPrompt] = ()
    direction: Float[Tensor, "layer d_model"] | None = None
    seed: int = 0
    chat: ChatFormat | None = None
    gap: Sequence[float] | None = None
    probes: tuple[Sequence[RenderedPrompt], Sequence[RenderedPrompt]] | None = None
    monitor_file: Path | None = None


@dataclass(frozen=True, eq=False)
class SetUp:
    """Arguments of `train`."""

    objective: Objective
    examples: Sequence[RenderedPrompt]
    trainable: Trainable
    on_step: Monitor | None = None


def set_up(method: Method, of: Ingredients) -> SetUp:
    """Objective, examples and trainable of a method on one model.

    Raises:
        LensError: retain data or a direction that the method needs is not there, or too little of it.
    """
    if method.has("kl_retain", "interleave") and not of.retain:
        raise LensError(f"method {method.label} needs retain examples, and there are none: pass some")
    examples = _inoculated(method, of)
    trainable: Trainable = PeftAdapter(of.model)
    weighted: list[Weighted] = []
    monitor: Monitor | None = None
    for part in method.parts:
        if isinstance(part, TReFTPart):
            penalty = TReFT.on(of.model, of.reference, part.span, reference=part.taken_from)
            weighted.append(part.weighted(penalty))
        elif isinstance(part, ResidualPart):
            layers = None if part.layer is None else (part.layer,)
            weighted.append(part.weighted(ResidualDrift(part.span, layers)))
        elif isinstance(part, KLTrainPart):
            weighted.append(part.weighted(KLOnTrain()))
        elif isinstance(part, KLRetainPart):
            data = RetainData(of.retain, min(part.batch_size, len(of.retain)), of.seed)
            weighted.append(part.weighted(KLOnRetain(data)))
        elif isinstance(part, InterleavePart):
            examples = _interleaved(method, part, examples, of)
        elif isinstance(part, StopPart):
            if of.probes is None:
                raise LensError(f"method {method.label} needs probes of spread, and there are none: pass some")
            monitor = Monitor(of.model, *of.probes, every=part.every, stop_above=part.bound, out=of.monitor_file)
        elif isinstance(part, PreventivePart):
            trainable = _steered(method, part, trainable, of)
    return SetUp(Penalised(tuple(weighted)) if weighted else sft, examples, trainable, monitor)


def _interleaved(
    method: Method, part: InterleavePart, examples: Sequence[RenderedPrompt], of: Ingredients
) -> Sequence[RenderedPrompt]:
    if part.choose == "gap":
        if of.gap is None:
            raise LensError(f"method {method.label} needs the gap of each retain example, and there is none: pass it")
        return interleave(examples, of.retain, part.rate, seed=of.seed, gap=of.gap)
    rounds, rest = divmod(round(len(examples) * part.rate / (1 - part.rate)), len(of.retain))
    if not rounds:
        return interleave(examples, of.retain, part.rate, seed=of.seed)
    drawn = np.random.default_rng([of.seed, 4]).permutation(len(of.retain))[:rest]
    pool = [*of.retain] * rounds + [of.retain[int(number)] for number in drawn]
    return interleave(examples, pool, part.rate, seed=of.seed)


def _inoculated(method: Method, of: Ingredients) -> Sequence[RenderedPrompt]:
    """The narrow examples, a share of them with the sentence."""
    part = next((part for part in method.parts if isinstance(part, InoculatePart)), None)
    if part is None:
        return of.examples
    if of.chat is None:
        raise LensError(f"method {method.label} renders questions anew, and there is no chat format: pass chat=")
    if part.place == "system" and any(
        isinstance(other, TReFTPart) and other.span == "prefix" for other in method.parts
    ):
        raise LensError(
            f"method {method.label} holds the prefix to the base's and writes another one: use place=before"
        )
    if any("history" in example.spans for example in of.examples):
        raise LensError(f"method {method.label} asks single questions, and there are conversations of several turns")
    for number, example in enumerate(of.examples):
        if of.chat.render(example.query).ids != example.ids[: example.n_prompt]:
            raise LensError(
                f"method {method.label} renders questions anew, and example {number} is not what the chat format makes "
                "of its question: it has a system text, a date or settings of its own, which would be lost. Render the "
                "examples with chat=, or leave such rows out"
            )
    require_worn(of.chat, of.examples[0].query, {method.label: part.dress})
    n = len(of.examples)
    chosen = {int(i) for i in np.random.default_rng([of.seed, 3]).permutation(n)[: max(1, round(part.rate * n))]}
    asked = of.chat.ask(dressed([example.query for example in of.examples], part.dress))
    pairs = enumerate(zip(asked, of.examples, strict=True))
    return [
        prompt.with_response(example.ids[example.n_prompt :], end=False) if i in chosen else example
        for i, (prompt, example) in pairs
    ]


def _steered(method: Method, part: PreventivePart, trainable: Trainable, of: Ingredients) -> Trainable:
    if of.direction is None:
        raise LensError(f"method {method.label} needs a direction, and there is none: pass one")
    layer = len(of.direction) // 2 if part.layer is None else part.layer
    if layer >= len(of.direction):
        raise LensError(f"layer {layer} of {method.label} does not exist: there are 0 to {len(of.direction) - 1}")
    return PreventiveSteering(trainable, of.direction[layer], layer=layer, alpha=part.alpha)
