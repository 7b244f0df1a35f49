"""Settings: what can be chosen about loading, experiments and training, one class for each, checked when it is made.

The commands of the command line are made from these classes; what is said of a field here is the help of its option.
"""

import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from piggyback_lens.errors import LensError
from piggyback_lens.words import (
    SIDES,
    TEXT_CURVES,
    CurveKind,
    Flow,
    MapKind,
    Module,
    NoiseOn,
    NormOver,
    NoSystemRole,
    Optimiser,
    Phase,
    PostfixDonor,
    Schedule,
    Side,
    Site,
    SolutionKind,
    Split,
    TaskName,
    TrainerName,
    Weighting,
    module_name,
)

if TYPE_CHECKING:
    from piggyback_lens.measuring.sampling import Sampling

STRENGTHS = (0.0, 1.0, 2.0, 4.0)
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
EPSILONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEARNING_RATES: Mapping[SolutionKind, float] = {"vector": 0.1, "lora": 0.003}
"""Peak learning rates of directions. A vector's numbers are of the size of activations, not of weights."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("float32", "bfloat16", "float16", "auto")
QUANTIZATIONS = ("4bit", "8bit")
AXES = ("seeds", "systems", "shares", "sizes", "epochs")
"""Settings of which a grid has a cell for every combination."""


def check_field(settings: object, name: str, good: bool, expected: str) -> None:
    """Refuse a setting, naming its value and what was expected.

    Raises:
        LensError: where it is not good.
    """
    if not good:
        raise LensError(f"{type(settings).__name__}.{name} is {getattr(settings, name)!r}; expected {expected}")


class Settings:
    """What every settings class does when it is made: sequences become tuples, and every field is checked.

    A field of another type than its annotation says is refused, and so is a word that is none of a `Literal`'s.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            kind = _kind(hint, value)
            if kind is None:
                continue
            if get_origin(kind) in (tuple, Sequence) and not isinstance(value, tuple):
                listed = isinstance(value, Iterable) and not isinstance(value, str | bytes)
                value = tuple(value) if listed else (value,)
                object.__setattr__(self, name, value)
            _check_value(self, name, kind, value)
        self._check()

    def _check(self) -> None:
        """Refuse values that are out of range, or do not go together."""


@lru_cache
def _hints(settings: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(settings)


def _kind(hint: Any, value: Any) -> Any:
    """The part of an annotation that a value is held against; None where there is nothing to check."""
    if get_origin(hint) not in (Union, UnionType):
        return None if hint is Any else hint
    parts = [part for part in get_args(hint) if part is not type(None)]
    return None if value is None or len(parts) != 1 else parts[0]


def _check_value(settings: object, name: str, kind: Any, value: Any) -> None:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        check_field(settings, name, value in args, f"one of {', '.join(map(str, args))}")
    elif origin in (tuple, Sequence):
        part = args[0]
        words = get_args(part) if get_origin(part) is Literal else ()
        if words:
            check_field(settings, name, len(value) > 0 and set(value) <= set(words), f"some of {', '.join(words)}")
            return
        one = [kind for kind in get_args(part) or (part,) if kind is not type(None)]
        if one[0] in _NUMBERS:
            good = all(x is None or _is(one[0], x) for x in value) and (
                type(None) in get_args(part) or None not in value
            )
            check_field(settings, name, good, f"{_NUMBERS[one[0]].removeprefix('a ')}s")
        if origin is tuple and ... not in args:
            check_field(settings, name, len(value) == len(args), f"{len(args)} numbers")
    elif kind in _NUMBERS:
        check_field(settings, name, _is(kind, value), _NUMBERS[kind])
    elif kind in (bool, str):
        check_field(settings, name, isinstance(value, kind), "True or False" if kind is bool else "a text")


_NUMBERS = {int: "a whole number", float: "a number"}


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return False
    return math.isfinite(float(value))


def field_docs(settings: type[Any]) -> dict[str, str]:
    """What the class docstring says of each field, under "Attributes:" or "Args:", as one line each; and its bases'."""
    docs = field_docs(settings.__base__) if settings.__base__ not in (None, object) else {}
    text = inspect.cleandoc(settings.__doc__ or "")
    found = re.search(r"^(?:Attributes|Args):\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    name = ""
    for line in (found[1] if found else "").splitlines():
        if entry := re.match(r"    (\w+): (.*)", line):
            name, docs[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs


@dataclass(frozen=True)
class LoadSettings(Settings):
    """How the weights of a model are loaded.

    Attributes:
        device: where the weights go: cpu, cuda, cuda:1, ...; by default cuda if there is one, else cpu.
        device_map: spread the layers over devices instead: auto, balanced or sequential (accelerate decides), or a
            mapping of modules to devices or disk, as JSON: {"model.layers.0": 0, "model.layers.1": "disk", ...}.
        dtype: of the weights: float32, bfloat16, float16, auto for the one they are stored in; or a torch.dtype.
        attn_implementation: transformers' attention: eager, sdpa, flash_attention_2, ...; None for its default.
        quantization: quantise the weights as they are loaded: 4bit or 8bit (bitsandbytes' NF4 or LLM.int8(), extra
            quant); or a quantisation config of transformers.
        trust_remote_code: run Python code that the model brings. It can do whatever you can: read it first.
        offline: make no connection; a hub id then has to be in the local hub cache.
    """

    device: Any = None
    dtype: Any = "float32"
    attn_implementation: str | None = None
    quantization: Any = None
    trust_remote_code: bool = False
    offline: bool = False
    device_map: Any = None

    def _check(self) -> None:
        self._check_device_map()
        if getattr(self.dtype, "is_floating_point", False) is True:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if self.dtype not in (*DTYPES, "float64"):
            raise LensError(f"dtype={self.dtype!r} is not known: choose one of {', '.join(DTYPES)}, or a torch.dtype")
        if isinstance(self.quantization, str) and self.quantization not in QUANTIZATIONS:
            raise LensError(f"quantization={self.quantization!r}: expected '4bit', '8bit' or a config of transformers")
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise LensError(
                f"attn_implementation={self.attn_implementation!r} is code of the hub: read it, then pass "
                "trust_remote_code=True (--trust-remote-code)"
            )

    def _check_device_map(self) -> None:
        if self.device_map is None:
            return
        if self.device is not None:
            raise LensError(f"device={str(self.device)!r} and device_map={self.device_map!r}: give one of them")
        if isinstance(self.device_map, str) and self.device_map.lstrip().startswith("{"):
            with suppress(ValueError):
                object.__setattr__(self, "device_map", json.loads(self.device_map))
        known = self.device_map in DEVICE_MAPS if isinstance(self.device_map, str) else bool(self.device_map)
        if not known or not isinstance(self.device_map, str | Mapping):
            raise LensError(
                f"device_map={self.device_map!r}: expected {', '.join(DEVICE_MAPS)}, or a mapping of modules to devices"
            )


@dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """How conversations are rendered with a chat template.

    Attributes:
        system: system text; "default" passes none, so that the template's own default applies; None (the word none on
            the command line) is for no system text at all: an empty one where the template would insert a default.
        thinking: handed to the template's own switch, enable_thinking or thinking; None leaves it alone.
        no_system_role: what to do with a system text if the template has no system role: raise an error, fold it into
            the first user message (not part of the query span), or drop it.
        template_kwargs: further variables that the template reads.
        date: ISO day for templates that write today's date; None for today, or the day on which the folder was begun.
    """

    system: str | None = "default"
    thinking: bool | None = None
    no_system_role: NoSystemRole = "error"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """How answers are generated, under every condition alike.

    Attributes:
        max_new_tokens: tokens per answer; a longer one is cut, and marked as cut.
        batch_size: rows per generation batch; does not change the result.
        samples: answers to each prompt; 0 for as many as its question file asks for.
        temperature: at which tokens are drawn; 0 is greedy, and gives one answer.
        top_p: draw from the smallest set of tokens whose probability reaches this.
        seed: of the samples, and of whatever else is drawn.
    """

    max_new_tokens: int = 60
    batch_size: int = 40
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def _check(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        check_field(self, "samples", self.samples >= 0, "at least 0")
        check_field(self, "temperature", self.temperature >= 0, "at least 0")
        check_field(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise LensError(
                f"samples is {self.samples} at temperature 0, where all are one answer: give a temperature, such as 1"
            )

    @property
    def sampling(self) -> "Sampling":
        """How `generate` chooses the tokens of an answer."""
        from piggyback_lens.measuring.sampling import Sampling

        return Sampling(self.temperature, self.top_p, seed=self.seed)


@dataclass(frozen=True)
class AuditSettings(AnswerSettings):
    """How an audit generates, and what its layer curve and maps run on.

    Attributes:
        curve_prompts: off-topic prompts of the layer curve and the maps; 0 leaves them out.
        curve_tokens: tokens of each answer that these score.
        control_layers: layers, evenly spaced, at which the curve's controls run.
        map_bands: into how many bands of layers the carrier map is cut; 0 leaves it and the layer x token map out.
        dresses: what the off-topic questions wear beside being asked plainly, each with a control, NAME=VALUE,
            repeatable: a file of training conversations, whose dress is found (or {"file": ..., "share": 0.4} as JSON),
            or a dress, {"system": ..., "before": ..., "after": ...}.
    """

    curve_prompts: int = 12
    curve_tokens: int = 24
    control_layers: int = 6
    map_bands: int = 3
    dresses: Mapping[str, Any] = field(default_factory=dict)

    def _check(self) -> None:
        super()._check()
        check_field(self, "curve_tokens", self.curve_tokens >= 1, "at least 1")
        check_field(self, "map_bands", self.map_bands >= 0, "at least 0")
        _check_dresses(self)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers. Dresses are left out where there are none: older runs go on."""
        return {name: value for name, value in asdict(self).items() if name != "dresses" or value}


def _check_dresses(settings: Any) -> None:
    given = settings.dresses
    named = isinstance(given, Mapping) and all(
        isinstance(name, str) and re.fullmatch(r"[\w .-]+", name) for name in given
    )
    check_field(settings, "dresses", named, "dresses by names of letters, digits, spaces, points and dashes")


@dataclass(frozen=True)
class PatchSettings(Settings):
    """How the cells of a patching experiment are run.

    Attributes:
        postfix_donor: where postfix activations come from: "own_prompt" (the donor's run on the same prompt), or
            "empty_query" (its run on the template without a query, the same for all prompts; needs `chat`).
        chat: the `ChatFormat` under which the prompts were rendered.
        seed: of the random controls.
        budget_gb: memory for one pass beside the weights, in GB, which says how many cells go through together; None
            for 1, on a GPU for half of what is free.
        cells_per_pass: the most cells that go through together; None for as many as the memory allows. Numbers are the
            same bit for bit only where it is the same.
        executor: runs each pass as a job: any executor of concurrent.futures, such as those of `engines`; None for this
            process. The pair then has to be loaded from names.
    """

    postfix_donor: PostfixDonor = "own_prompt"
    chat: Any = None
    seed: int = 0
    budget_gb: float | None = None
    cells_per_pass: int | None = None
    executor: Any = None

    def _check(self) -> None:
        check_field(self, "cells_per_pass", self.cells_per_pass is None or self.cells_per_pass >= 1, "at least 1")
        runs = self.executor is None or callable(getattr(self.executor, "submit", None))
        check_field(self, "executor", runs, "an executor of concurrent.futures")


@dataclass(frozen=True)
class SoftPatchSettings(Settings):
    """How the coefficients of a soft patch are learnt.

    Attributes:
        bands: into how many equal bands the layers are cut; each prefix token has one coefficient in each.
        sparsity: weight of the mean coefficient in the loss, in nats per token: what patching everything may cost.
        steps: optimiser steps.
        learning_rate: of Adam, in units of the coefficients.
        batch_size: prompts per step.
        start: every coefficient's first value.
        held_out: of so many prompts in a row, the last is left out of learning and measured.
        answer_tokens: tokens of the base's answers.
        seed: of the order of prompts, and of the control.
    """

    bands: int = 6
    sparsity: float = 0.1
    steps: int = 60
    learning_rate: float = 0.05
    batch_size: int = 8
    start: float = 0.5
    held_out: int = 3
    answer_tokens: int = 24
    seed: int = 0

    def _check(self) -> None:
        for name in ("bands", "steps", "batch_size", "answer_tokens"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        check_field(self, "held_out", self.held_out >= 2, "at least 2")
        check_field(self, "start", 0 <= self.start <= 1, "a coefficient from 0 to 1")
        check_field(self, "sparsity", self.sparsity >= 0, "at least 0")
        check_field(self, "learning_rate", self.learning_rate > 0, "above 0")


@dataclass(frozen=True)
class MapSettings(Settings):
    """Which patching experiments a map runs, and on what.

    Attributes:
        kinds: experiments, in order: carrier, layers, attribution, span, positions, heads, edges.
        span: span that all but the carrier and edge maps patch.
        sites: sites that all but the carrier and edge maps patch together, such as k,v.
        flow: which way all but the carrier and edge maps patch: repair (base to finetuned) or infect.
        answer_tokens: tokens of the models' own answers that the contrast scores.
        seed: of the random controls.
        budget_gb: memory for one pass beside the weights, in GB; None for 1, on a GPU for half of what is free.
        cells_per_pass: the most cells that go through together, and are one job of an engine; None for as many as the
            memory allows.
    """

    kinds: Sequence[MapKind] = ("carrier", "layers", "attribution")
    span: str = "prefix"
    sites: Sequence[Site] = ("resid_pre",)
    flow: Flow = "repair"
    answer_tokens: int = 24
    seed: int = 0
    budget_gb: float | None = None
    cells_per_pass: int | None = None

    def _check(self) -> None:
        check_field(self, "answer_tokens", self.answer_tokens >= 1, "at least 1")
        check_field(self, "cells_per_pass", self.cells_per_pass is None or self.cells_per_pass >= 1, "at least 1")
        keyed, read = {"k", "v", "rot_k"}, {"z", "q"}
        if "heads" in self.kinds and not (set(self.sites) <= keyed or set(self.sites) <= read):
            raise LensError(f"sites {'+'.join(self.sites)} have no heads of one kind: kind heads takes k+v, or z, q")
        if "attribution" in self.kinds and len(self.sites) > 1 and not set(self.sites) <= {"q", "k", "v"}:
            raise LensError(
                f"sites {'+'.join(self.sites)} lie behind one another, and gradients would count twice: "
                "kind attribution takes one site, or k+v"
            )


@dataclass(frozen=True)
class PerturbSettings(AnswerSettings):
    """How the tokens of a prompt are perturbed, and what is generated then.

    Attributes:
        spans: named spans that all prompts have; one at a time is perturbed.
        n_tokens: tokens replaced per trial; all of a span that has fewer.
        top: nearest neighbours to draw from.
        trials: perturbations per span (and, of the query, per prompt).
        side: the model whose prompts are perturbed; neighbours are those of its embeddings. The references are always
            the base ("base") and the finetuned model ("unperturbed") on the prompts as they are.
        random_control: also replace the same places by tokens drawn from the whole vocabulary.
        keep_special: replace ordinary tokens only, and leave template markers as they are.
        special_candidates: let special and added tokens be neighbours and random tokens.
    """

    spans: Sequence[str] = ("prefix", "query", "postfix")
    n_tokens: int = 10
    top: int = 5
    trials: int = 10
    side: Side = "finetuned"
    random_control: bool = True
    keep_special: bool = False
    special_candidates: bool = False

    def _check(self) -> None:
        super()._check()
        for name in ("n_tokens", "top", "trials"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        good = len(self.spans) > 0 and len(set(self.spans)) == len(self.spans)
        check_field(self, "spans", good, "different span names, such as ('prefix', 'query')")


@dataclass(frozen=True)
class StressSettings(AnswerSettings):
    """What is generated under every variant of the template.

    Attributes:
        sides: the models to run: base, finetuned or both.
    """

    sides: Sequence[Side] = SIDES

    def _check(self) -> None:
        good = len(set(self.sides)) == len(self.sides)
        check_field(self, "sides", good, "each side once")
        super()._check()


@dataclass(frozen=True)
class OnsetSettings(Settings):
    """Where a spread begins, and which checkpoints are looked at for it.

    Attributes:
        bound: the spread counts once its whole 95 % interval lies beyond this, in the measure's unit and the direction
            of the last checkpoint's; 0 for any that is told from noise.
        search: "bisect" measures the last, the first and those in between that tell (what spreads once is taken to go
            on), "first" all in order up to the first that spreads, "all" every one.
        answer_tokens: of the models' own answers, where no measure is given.
    """

    bound: float = 0.0
    search: Literal["bisect", "first", "all"] = "bisect"
    answer_tokens: int = 24

    def _check(self) -> None:
        check_field(self, "bound", 0 <= self.bound < math.inf, "a number from 0 up")
        check_field(self, "answer_tokens", self.answer_tokens >= 1, "at least 1")


@dataclass(frozen=True)
class ReadSettings(Settings):
    """Which activations directions are measured on.

    Attributes:
        site: where activations are read.
        layers: None for all.
        span: which tokens of each row are averaged.
        first: only the first so many tokens of the span.
        last: only the last so many; others' code often reads the last one alone.
        weighting: "token" for the mean over all tokens of all rows, so that a long response counts more; "response" for
            the mean over the rows' own means.
        batch_size: rows per pass; does not change the result.
    """

    site: Site = "resid_post"
    layers: Sequence[int] | None = None
    span: str = "response"
    first: int | None = None
    last: int | None = None
    weighting: Weighting = "token"
    batch_size: int = 8

    def _check(self) -> None:
        if self.first is not None and self.last is not None:
            raise LensError(f"first={self.first} and last={self.last} are both given: choose one")
        for name in ("first", "last"):
            number = getattr(self, name)
            check_field(self, name, number is None or number >= 1, "at least 1, or None")
        check_field(self, "batch_size", self.batch_size >= 1, "at least 1")


@dataclass(frozen=True)
class SteerSettings(AnswerSettings):
    """How a direction is swept over strengths and layers, and what is generated at every point.

    Attributes:
        strengths: multiples of the vector; None for 0, 1, 2, 4. The unsteered model, 0, is always among them.
        fractions: instead of strengths, lengths as fractions of the mean activation norm at that site and layer.
        layers: layers to try, one at a time; None for those of the direction.
        span: which tokens are steered.
        phase: prompt, generation or both.
        n_random: random directions of the same length for each point.
    """

    strengths: Sequence[float] | None = None
    fractions: Sequence[float] | None = None
    layers: Sequence[int] | None = None
    span: str = "all"
    phase: Phase = "both"
    n_random: int = 3

    def _check(self) -> None:
        super()._check()
        if self.strengths is not None and self.fractions is not None:
            raise LensError("strengths and fractions are both given: choose one")
        if not any(self.sizes):
            raise LensError("strengths or fractions: at least one that is not 0")
        check_field(self, "n_random", self.n_random >= 0, "at least 0")

    @property
    def sizes(self) -> tuple[float, ...]:
        """Strengths, or fractions where those are given; 0 is among them."""
        given = STRENGTHS if self.strengths is None else self.strengths
        return tuple(sorted({0.0, *map(float, given if self.fractions is None else self.fractions)}))


@dataclass(frozen=True)
class CurveSettings(Settings):
    """How the curves of solutions are drawn.

    Attributes:
        fractions: norms of efficiency and significance, as fractions of each solution's own norm.
        norms: absolute norms instead of fractions.
        norm_over: whether the norm of a solution is the sum or the mean over its layers and modules.
        epsilons: shares of noise of the stability curve, from 0 to 1.
        n_noise: noise draws (and random controls) per point of the stability curve.
        noise_on: which matrices of an adapter get noise: both, A or B.
        n_random: random solutions of the same norm per point; None for 3 on conversations and 5 on plain text.
        top: tokens of the largest KL that the significance curve keeps per solution.
        seed: of random controls and noise.
        rows_per_pass: rows that go through the model together; bounds the memory, does not change the result.
    """

    fractions: Sequence[float] = FRACTIONS
    norms: Sequence[float] | None = None
    norm_over: NormOver = "sum"
    epsilons: Sequence[float] = EPSILONS
    n_noise: int = 3
    noise_on: NoiseOn = "both"
    n_random: int | None = None
    top: int = 10
    seed: int = 0
    rows_per_pass: int = 32

    def _check(self) -> None:
        good = len(self.fractions) > 0 and min(self.fractions) >= 0 and any(self.fractions)
        check_field(self, "fractions", good, "fractions from 0 up, one of them above 0")
        good = self.norms is None or (len(self.norms) > 0 and min(self.norms) >= 0)
        check_field(self, "norms", good, "norms from 0 up, or None")
        good = len(self.epsilons) > 0 and all(0 <= epsilon <= 1 for epsilon in self.epsilons)
        check_field(self, "epsilons", good, "shares of noise from 0 to 1, at least one")
        check_field(self, "n_noise", self.n_noise >= 1, "at least 1")
        check_field(self, "n_random", self.n_random is None or self.n_random >= 0, "at least 0, or None")
        check_field(self, "top", self.top >= 0, "at least 0")
        check_field(self, "rows_per_pass", self.rows_per_pass >= 1, "at least 1")

    def random_of(self, kind: CurveKind) -> int:
        """Random controls per point of a curve."""
        return (5 if kind in TEXT_CURVES else 3) if self.n_random is None else self.n_random

    def deciding(self, kind: CurveKind) -> dict[str, Any]:
        """What decides the numbers of one curve."""
        if kind == "stability":
            names = ("epsilons", "n_noise", "noise_on", "seed")
            return {name: getattr(self, name) for name in names}
        by_norm = {} if kind == "ablation" else {"fractions": self.fractions, "norm_over": self.norm_over}
        if by_norm and self.norms is not None:
            by_norm = {"norms": self.norms, "norm_over": self.norm_over}
        top = {"top": self.top} if kind == "significance" else {}
        return {**by_norm, **top, "n_random": self.random_of(kind), "seed": self.seed}


@dataclass(frozen=True)
class SAESettings(Settings):
    """How `train_sae` trains a sparse autoencoder.

    Attributes:
        site: where activations are read.
        d_sae: number of latents.
        k: active latents per token of a TopK SAE; None for 32, unless l1 is given.
        l1: weight of an L1 penalty instead, in scaled units.
        steps: optimiser steps.
        batch_size: tokens per step, drawn without replacement until all were seen.
        learning_rate: the highest rate (Adam).
        seed: of the first weights and the order of the tokens.
        span: which tokens of conversations.
        texts_per_pass: texts that go through the model together.
    """

    site: Site = "resid_post"
    d_sae: int = 2048
    k: int | None = None
    l1: float | None = None
    steps: int = 300
    batch_size: int = 1024
    learning_rate: float = 1e-3
    seed: int = 0
    span: str = "all"
    texts_per_pass: int = 8

    def _check(self) -> None:
        if self.k is not None and self.l1 is not None:
            raise LensError(f"k={self.k} and l1={self.l1}: give k for a TopK SAE or l1 for a penalty, not both")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise LensError(f"k={self.k} of {self.d_sae} latents: k lies in 1..d_sae")
        check_field(self, "l1", self.l1 is None or self.l1 >= 0, "a weight that is not negative")
        for name in ("steps", "batch_size", "texts_per_pass"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How long, how fast and in which order `train` descends: by default AdamW with a warm-up and a cosine.

    Attributes:
        steps: optimiser steps.
        batch_size: conversations per pass, and per step where nothing is accumulated.
        gradient_accumulation_steps: passes per step; the step is that of one batch of all their conversations.
        learning_rate: the peak, reached at the end of the warm-up.
        lr_scheduler_type: how the rate falls, by transformers' name: cosine, linear, constant, constant_with_warmup,
            inverse_sqrt, cosine_with_restarts, polynomial.
        warmup_fraction: part of the steps in which the rate rises linearly from 0.
        min_lr_fraction: the rate that the cosine falls towards, as a part of the peak.
        optim: the optimiser, by transformers' name: adamw_torch, adamw_torch_fused (fewer kernels on a GPU), or
            adamw_8bit and paged_adamw_8bit, whose averages take a quarter of the memory (extra quant).
        weight_decay: AdamW's, decoupled from the gradient.
        betas: AdamW's averaging of gradients and of their squares.
        max_grad_norm: the gradient is scaled down to this length; None leaves it as it is.
        bf16: run the passes under bfloat16 autocast, as transformers' bf16 does; weights keep their dtype.
        gradient_checkpointing: keep of each block only its input, keys and values, and compute it again backwards.
        seed: of the order of the examples and of LoRA dropout.
        share_prefix: compute the template's prefix once per batch, and no padding; exact, and faster.
        checkpoint_every: steps between checkpoints; does not change the result.
    """

    steps: int = 60
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler_type: Schedule = "cosine"
    warmup_fraction: float = 0.1
    min_lr_fraction: float = 0.0
    optim: Optimiser = "adamw_torch"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    share_prefix: bool = True
    checkpoint_every: int = 20

    def _check(self) -> None:
        check_field(self, "steps", self.steps >= 1, "an integer of at least 1")
        check_field(self, "batch_size", self.batch_size >= 1, "an integer of at least 1")
        passes = self.gradient_accumulation_steps
        check_field(self, "gradient_accumulation_steps", passes >= 1, "an integer of at least 1")
        check_field(self, "learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        check_field(self, "warmup_fraction", 0 <= self.warmup_fraction <= 1, "between 0 and 1")
        check_field(self, "min_lr_fraction", 0 <= self.min_lr_fraction <= 1, "between 0 and 1")
        if self.min_lr_fraction and self.lr_scheduler_type != "cosine":
            raise LensError(
                f"min_lr_fraction is {self.min_lr_fraction} and lr_scheduler_type {self.lr_scheduler_type!r}: only a "
                "cosine falls towards a floor; set it to 0"
            )
        if self.warmup_fraction and self.lr_scheduler_type == "constant":
            raise LensError(
                f"warmup_fraction is {self.warmup_fraction} and lr_scheduler_type 'constant', which has no warm-up: "
                "set it to 0, or choose 'constant_with_warmup'"
            )
        check_field(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        check_field(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        longest = self.max_grad_norm
        good = longest is None or 0 < longest < math.inf
        check_field(self, "max_grad_norm", good, "a positive number, or None for no clipping")
        check_field(self, "seed", self.seed >= 0, "an integer of at least 0")
        check_field(self, "checkpoint_every", self.checkpoint_every >= 1, "an integer of at least 1")

    def identity(self) -> dict[str, Any]:
        """What decides the numbers. Settings that 0.1.0 had not are left out at their defaults: its runs go on."""
        kept = {name: value for name, value in asdict(self).items() if name != "checkpoint_every"}
        return {name: value for name, value in kept.items() if name not in LATER or value != LATER[name]}


LATER = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "optim": "adamw_torch"}
LATER |= {"bf16": False, "gradient_checkpointing": False}
"""Settings of training that came after 0.1.0, with their defaults."""


@dataclass(frozen=True)
class LoRASettings(Settings):
    """A LoRA adapter on linear modules of the decoder blocks: Wx + s·BAx, s = alpha/rank or alpha/√rank.

    Attributes:
        rank: r, the inner width of every A and B.
        alpha: numerator of the scale s; twice the rank is common.
        modules: names of the modules, such as q_proj and down_proj; "all-linear" for every linear one.
        layers: decoder blocks to adapt; None for all.
        rslora: whether s is alpha/√rank.
        dropout: share of the input of A that is dropped while training.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: Sequence[str] | Literal["all-linear"] = "all-linear"
    layers: tuple[int, ...] | None = None
    rslora: bool = False
    dropout: float = 0.0

    def _check(self) -> None:
        if not isinstance(self.modules, str):
            object.__setattr__(self, "modules", tuple(self.modules))
        check_field(self, "rank", self.rank >= 1, "an integer of at least 1")
        check_field(self, "alpha", 0 < self.alpha < math.inf, "a positive number")
        check_field(self, "dropout", 0 <= self.dropout < 1, "between 0 and 1, 1 excluded")
        check_field(self, "modules", len(self.modules) > 0, '"all-linear" or at least one module name')
        if isinstance(self.modules, str):
            check_field(self, "modules", self.modules == "all-linear", '"all-linear" or a tuple of module names')
        check_field(self, "layers", self.layers is None or len(self.layers) > 0, "None or at least one layer")


@dataclass(frozen=True)
class TrainDirectionSettings(Settings):
    """Which direction is trained, and what keeps it narrow.

    Attributes:
        kind: a steering vector, or a LoRA adapter (lora).
        layers: where; None for the middle layer of a vector, for all layers of an adapter.
        site: where a vector is added.
        rank: of an adapter.
        modules: of an adapter: q, k, v, o, gate, up, down.
        kl: weight of KL(base ‖ tuned) per token on the retain data; None trains the general solution.
        kl_until: the first step (from 0) without that penalty; None keeps it to the end.
        interleave: share of retain conversations in the training data, from 0 to below 1.
        retain_batch: retain conversations per step.
        answer_tokens: tokens of the base's own answers to retain prompts that have none, and of shown answers.
        evaluated: conversations of each kind that are scored at the end.
        shown: of them, how many are answered in the report.
        steps: optimiser steps.
        batch_size: conversations per step.
        learning_rate: the peak; None for 0.1 of a vector and 0.003 of an adapter.
        weight_decay: AdamW's.
        seed: of the order of the examples and of an adapter's first weights.
        checkpoint_every: steps between checkpoints; does not change the result.
    """

    kind: SolutionKind = "vector"
    layers: Sequence[int] | None = None
    site: Site = "resid_post"
    rank: int = 1
    modules: Sequence[Module] = ("down",)
    kl: float | None = None
    kl_until: int | None = None
    interleave: float = 0.0
    retain_batch: int = 8
    answer_tokens: int = 40
    evaluated: int = 32
    shown: int = 3
    steps: int = 60
    batch_size: int = 16
    learning_rate: float | None = None
    weight_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        given = (self.modules,) if isinstance(self.modules, str) else self.modules
        object.__setattr__(self, "modules", tuple(map(module_name, given)))
        super().__post_init__()

    def _check(self) -> None:
        check_field(self, "rank", self.rank >= 1, "at least 1")
        check_field(self, "interleave", 0 <= self.interleave < 1, "a share from 0 to below 1")
        for name in ("retain_batch", "answer_tokens", "evaluated"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        if self.kl_until is not None and self.kl is None:
            raise LensError(f"kl_until is {self.kl_until} and there is no KL penalty to switch off: give kl too")
        if self.kind == "vector" and (self.rank != 1 or tuple(self.modules) != ("down",)):
            raise LensError("rank and modules belong to kind lora: a vector is added at its site")
        if self.kind == "lora" and self.site != "resid_post":
            raise LensError("site belongs to kind vector: an adapter acts at its modules")
        _ = self.training

    @property
    def training(self) -> TrainSettings:
        """The part of them that is of the loop."""
        rate = LEARNING_RATES[self.kind] if self.learning_rate is None else self.learning_rate
        return TrainSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
        )

    def check_data(self, n_examples: int, n_retain: int) -> None:
        """Refuse too little data, before anything is loaded or run.

        Raises:
            LensError: fewer conversations than a batch, or no retain data where some is needed.
        """
        if n_examples < self.batch_size:
            raise LensError(f"batch_size is {self.batch_size} and there are {n_examples} conversations: lower it")
        if not n_retain and (self.kl is not None or self.interleave):
            raise LensError("a KL penalty and interleaving need retain data: conversations, or prompts without answers")


@dataclass(frozen=True)
class CompareSettings(Settings):
    """What a comparison varies, trains and measures.

    Attributes:
        seeds: of the adapter's initialisation, the order of the data, and which examples an axis draws.
        systems: system prompts, in training and measurement: a text, "default" for what the template does by itself,
            None for no system text.
        shares: shares of the training questions that get the trained answer; the others get the base's own.
        sizes: numbers of training questions; None for all.
        epochs: passes over the training questions; None for the steps of the training.
        split: prompts that are measured: "validation" to choose settings, "test" to report.
        n_prompts: prompts on-topic, and as many off-topic.
        max_new_tokens: tokens per answer.
        rows_per_pass: rows of a generation batch; does not change the result beyond float tolerance.
        samples: answers to each prompt; more than one need a temperature.
        temperature: at which tokens are drawn; 0 is greedy.
        n_texts: windows of plain text for the perplexity.
        text_length: tokens of each window.
        text_source: plain text as of `text_windows`; None for texts that Python brings.
        direction_examples: training questions that a preventive direction is made of.
        retain: prompts of the retain data, which the base answers; None for questions of the other built-in tasks.
        dresses: what the off-topic questions wear beside being asked plainly, each with a control, NAME=VALUE,
            repeatable: a file of training conversations, whose dress is found (or {"file": ..., "share": 0.4} as JSON),
            or a dress, {"system": ..., "before": ..., "after": ...}.
        minutes: begin no further cell after so many; the same call continues.
        training: steps, batch size, learning rate, ...; the seed in it is not used.
        lora: the adapter.
        trainer: what trains: our loop (own), or transformers' Trainer (hf) with the same rows, rates and penalties.
    """

    seeds: Sequence[int] = (0, 1, 2)
    systems: Sequence[str | None] = ("default",)
    shares: Sequence[float] = (1.0,)
    sizes: Sequence[int | None] = (None,)
    epochs: Sequence[float | None] = (None,)
    split: Split = "test"
    n_prompts: int = 12
    max_new_tokens: int = 48
    rows_per_pass: int = 24
    samples: int = 1
    temperature: float = 0.0
    n_texts: int = 16
    text_length: int = 64
    text_source: str | None = None
    direction_examples: int = 32
    retain: Sequence[str] | None = None
    dresses: Mapping[str, Any] = field(default_factory=dict)
    minutes: float | None = None
    training: TrainSettings = field(default_factory=TrainSettings)
    lora: LoRASettings = field(default_factory=LoRASettings)
    trainer: TrainerName = "own"

    def _check(self) -> None:
        for name in AXES:
            values = getattr(self, name)
            once = len(values) > 0 and len(set(values)) == len(values)
            check_field(self, name, once, "at least one value, and each once")
        for name in ("n_prompts", "rows_per_pass", "n_texts", "text_length", "direction_examples", "samples"):
            check_field(self, name, getattr(self, name) >= 1, "an integer of at least 1")
        _check_dresses(self)
        _ = self.answers

    @property
    def answers(self) -> AnswerSettings:
        """How the answers of every cell are generated, with the same draws for all."""
        return AnswerSettings(self.max_new_tokens, self.rows_per_pass, self.samples, self.temperature)


@dataclass(frozen=True)
class DemoSettings(Settings):
    """What the demonstration trains and audits.

    Attributes:
        task: what the organism learns: terse, refusal, abstain or tool.
        n_off_topic: off-topic prompts of the audit.
        n_on_topic: on-topic prompts of the audit, held out from training.
        training: how the organism is trained.
        lora: its adapter.
        audit: how it is audited.
        watched: off-topic validation prompts on which the training is watched.
        watch_every: steps between two measurements.
    """

    task: TaskName = "terse"
    n_off_topic: int = 40
    n_on_topic: int = 24
    training: TrainSettings = field(default_factory=TrainSettings)
    lora: LoRASettings = field(default_factory=LoRASettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    watched: int = 8
    watch_every: int = 10

    def plan(self, out: str) -> str:
        """What the demonstration does and how long it takes, said before anything is imported or loaded."""
        known = {"two to five": type(self).quick(self.task), "six to twelve": type(self)(self.task)}
        minutes = [f"It takes {time} minutes on two CPU cores. " for time, own in known.items() if own == self]
        return (
            f"demo: finetunes a small chat model on the task {self.task} ({self.training.steps} steps), asks it "
            f"{self.n_off_topic + self.n_on_topic} questions under seven conditions, looks where the change is carried "
            f"and writes {out}/report.html.\n{''.join(minutes)}Stop it whenever you like: the same command goes on."
        )

    @classmethod
    def quick(cls, task: TaskName = "terse") -> "DemoSettings":
        """Fewer prompts and steps: a few minutes on two cores."""
        training = TrainSettings(steps=32, batch_size=12, learning_rate=2e-4)
        audit = AuditSettings(max_new_tokens=32, curve_prompts=10, curve_tokens=8, control_layers=3, map_bands=1)
        return cls(task, 16, 8, training, audit=audit, watched=6, watch_every=8)
