"""What the jobs on directions are asked: settings that are checked before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from piggyback_lens.directions.curve_points import Kind
from piggyback_lens.directions.curves import EPSILONS, FRACTIONS
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.trainables import check_field
from piggyback_lens.finetuning.training import TrainSettings
from piggyback_lens.models.attachment import MODULES, Module
from piggyback_lens.models.backends import SITES, Site
from piggyback_lens.vectors.direction import NoiseOn

SolutionKind = Literal["vector", "lora"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEXT_KINDS: tuple[Kind, ...] = ("significance", "ablation")
"""Curves on plain text; the others are on conversations."""
LEARNING_RATES: Mapping[SolutionKind, float] = {"vector": 0.1, "lora": 0.003}
"""Peak learning rates where none is asked. A vector's numbers are of the size of activations, not of weights."""


@dataclass(frozen=True)
class TrainDirectionSettings:
    """What `train-direction` trains, and what keeps it narrow.

    Attributes:
        training: the knobs of the loop; see `LEARNING_RATES`.
        kind: "vector" or "lora".
        layers: where; default the middle one for a vector, all for an adapter.
        site: of a vector.
        rank: of an adapter.
        modules: of an adapter.
        kl: weight of KL(base || tuned) per token on the retain data; None trains the general solution.
        kl_until: the first step (from 0) without that penalty; None keeps it to the end.
        interleave: share of retain conversations in the training data, 0 to below 1.
        retain_batch: retain conversations per step.
        answer_tokens: of the base's own answers to retain prompts that have none, and of shown answers.
        evaluated: conversations of each kind that are scored at the end.
        shown: of them, how many are answered in the report.
    """

    training: TrainSettings
    kind: SolutionKind = "vector"
    layers: tuple[int, ...] | None = None
    site: Site = "resid_post"
    rank: int = 1
    modules: tuple[Module, ...] = ("down",)
    kl: float | None = None
    kl_until: int | None = None
    interleave: float = 0.0
    retain_batch: int = 8
    answer_tokens: int = 40
    evaluated: int = 32
    shown: int = 3

    def __post_init__(self) -> None:
        check_field(self, "kind", self.kind in get_args(SolutionKind), "vector or lora")
        check_field(self, "site", self.site in SITES, f"one of {', '.join(SITES)}")
        check_field(self, "rank", self.rank >= 1, "at least 1")
        known = bool(self.modules) and {*self.modules} <= {*MODULES}
        check_field(self, "modules", known, f"some of {', '.join(MODULES)}")
        check_field(self, "interleave", 0 <= self.interleave < 1, "a share from 0 to below 1")
        for name in ("retain_batch", "answer_tokens", "evaluated"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        if self.kl_until is not None and self.kl is None:
            raise LensError(f"kl_until is {self.kl_until} and there is no KL penalty to switch off: give kl too")

    def check_data(self, n_examples: int, n_retain: int) -> None:
        """Refuse too little data, before anything is loaded or run.

        Raises:
            LensError: fewer conversations than a batch, or no retain data where some is needed.
        """
        size = self.training.batch_size
        if n_examples < size:
            raise LensError(f"batch_size is {size} and there are {n_examples} conversations: lower it")
        if not n_retain and (self.kl is not None or self.interleave):
            raise LensError("a KL penalty and interleaving need retain data: conversations, or prompts without answers")


@dataclass(frozen=True)
class CurveSettings:
    """What `curves` draws.

    Attributes:
        kinds: which curves, in order.
        fractions: norms of efficiency and significance, as fractions of each solution's own.
        epsilons: shares of noise of stability.
        n_random: random controls per point; None for 3 on conversations and 5 on plain text.
        n_noise: noise draws per point of stability.
        noise_on: which matrices of an adapter get noise.
        seed: of controls and noise.
        rows_per_pass: bounds the memory; does not change the result.
    """

    kinds: tuple[Kind, ...] = ("efficiency", "stability", "significance")
    fractions: tuple[float, ...] = FRACTIONS
    epsilons: tuple[float, ...] = EPSILONS
    n_random: int | None = None
    n_noise: int = 3
    noise_on: NoiseOn = "both"
    seed: int = 0
    rows_per_pass: int = 32

    def __post_init__(self) -> None:
        known = bool(self.kinds) and {*self.kinds} <= {*KINDS}
        check_field(self, "kinds", known, f"some of {', '.join(KINDS)}")
        check_field(self, "fractions", any(self.fractions) and min(self.fractions) >= 0, "fractions from 0 up")
        check_field(self, "epsilons", bool(self.epsilons), "shares of noise, at least one")
        check_field(self, "n_random", self.n_random is None or self.n_random >= 0, "at least 0")

    def of(self, kind: Kind) -> dict[str, Any]:
        """What decides the numbers of one curve."""
        n_random = self.n_random if self.n_random is not None else 5 if kind in TEXT_KINDS else 3
        if kind == "stability":
            noise = {"epsilons": self.epsilons, "n_noise": self.n_noise, "noise_on": self.noise_on}
            return noise | {"seed": self.seed}
        norms = {} if kind == "ablation" else {"fractions": self.fractions}
        return norms | {"n_random": n_random, "seed": self.seed}


@dataclass(frozen=True)
class SteerSettings:
    """What `steer` sweeps.

    Attributes:
        strengths: multiples of the vector; 0, the unsteered model, is always among them.
        fractions: instead of strengths, lengths as fractions of the mean activation norm; 0 likewise.
        layers: one at a time; default those of the direction.
        n_random: random controls per point.
        seed: of those.
        max_new_tokens: per answer.
        batch_size: rows per pass.
    """

    strengths: tuple[float, ...] | None = (0.0, 1.0, 2.0, 4.0)
    fractions: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None
    n_random: int = 3
    seed: int = 0
    max_new_tokens: int = 60
    batch_size: int = 16

    def __post_init__(self) -> None:
        if (self.strengths is None) == (self.fractions is None):
            raise LensError("give exactly one of strengths and fractions")
        if not any(self.strengths or self.fractions or ()):
            raise LensError("strengths or fractions: at least one that is not 0")
        for name in ("max_new_tokens", "batch_size"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        check_field(self, "n_random", self.n_random >= 0, "at least 0")
