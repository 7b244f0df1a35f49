"""How the next token is chosen: transformers' own warpers, then one number per row and step from the row's own seed.

The draw inverts the distribution that is left after all warpers, at a number between 0 and 1 that depends on seed,
prompt, sample number and step alone. So neither batch, order nor device decides a text, and nothing is drawn from
the global random state.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import generation_config_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; settings act in the order of transformers.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this.
        top_k: at most so many tokens; None for no limit.
        seed: together with the prompt's ids and the sample's number it decides each text.
        min_p: tokens at least this fraction as probable as the likeliest; None for no limit.
        repetition_penalty: logits of tokens of the prompt and the answer so far are divided by it (multiplied, where
            they are negative); it acts on greedy answers too.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        usable = 0 <= self.temperature < math.inf and 0 < self.top_p <= 1
        usable = usable and (self.top_k is None or self.top_k >= 1) and (self.min_p is None or 0 <= self.min_p <= 1)
        if not usable or not 0 < self.repetition_penalty < math.inf:
            raise LensError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}, "
                f"repetition_penalty {self.repetition_penalty}: expected temperature >= 0, 0 < top_p <= 1, top_k >= 1 "
                "or None, 0 <= min_p <= 1 or None, and a penalty above 0"
            )

    @classmethod
    def of_model(cls, model: Any, *, seed: int = 0) -> "Sampling":
        """What the model's own generation config says; greedy where it does not sample.

        Args:
            model: a hooked model of the bridge, or a transformers model.
            seed: see the class.

        Raises:
            LensError: a HookedTransformer, which has no generation config, or a config that asks for more than these
                settings can say, such as no_repeat_ngram_size.
        """
        config = generation_config_of(model)
        if config is None:
            raise LensError(f"{type(model).__name__} has no generation config: give temperature, top_p and so on")

        def said(name: str, usual: Any) -> Any:
            value = getattr(config, name, None)
            return usual if value is None else value

        if beyond := [f"{name}={said(name, usual)!r}" for name, usual in _BEYOND.items() if said(name, usual) != usual]:
            raise LensError(
                f"the generation config of {type(model).__name__} says {', '.join(beyond)}, which is not supported: "
                "give a Sampling of your own"
            )
        penalty = float(said("repetition_penalty", 1.0))
        if not said("do_sample", False):
            return cls(seed=seed, repetition_penalty=penalty)
        return cls(
            float(said("temperature", 1.0)),
            float(said("top_p", 1.0)),
            said("top_k", None) or None,
            seed,
            getattr(config, "min_p", None),
            penalty,
        )


_BEYOND: dict[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "min_new_tokens": None, "min_length": 0, "suppress_tokens": None, "begin_suppress_tokens": None,
    "bad_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None,
    "exponential_decay_length_penalty": None, "penalty_alpha": None, "top_h": None,
}  # fmt: skip
"""What else transformers' generation configs may say, and where it says nothing."""


class Chooser:
    """Picks the next token of each row, step by step."""

    def __init__(self, rows: Sequence[tuple[int, ...]], samples: Sequence[int], settings: Sampling, steps: int) -> None:
        """Draw what all steps need.

        Args:
            rows: the prompts' ids.
            samples: the number of each row's sample.
            settings: how to choose.
            steps: the most tokens that will be chosen.
        """
        self.sampled = settings.temperature > 0
        self.seeds = [_row_seed(ids, settings.seed, n) for ids, n in zip(rows, samples, strict=True)]
        numbers = [np.random.default_rng(seed).random(steps) for seed in self.seeds] if self.sampled else []
        self._numbers = torch.tensor(np.array(numbers))
        self._warpers = _warpers(settings)
        width = max(map(len, rows))
        # Of a token that stands twice a penalty acts once, so rows are filled up with their own first token.
        self._seen = torch.tensor([[*ids, *ids[:1] * (width - len(ids))] for ids in rows])
        self._penalised = settings.repetition_penalty != 1

    def seed_of(self, row: int) -> int | None:
        """The seed of a row's sample; None if nothing is drawn."""
        return self.seeds[row] if self.sampled else None

    def __call__(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[int], step: int) -> Int[Tensor, " batch"]:
        """The next tokens of some of the rows."""
        here = torch.tensor(rows)
        scores = logits
        if self._warpers:
            if self._seen.device != logits.device:
                self._seen = self._seen.to(logits.device)
            scores = self._warpers(self._seen[here.to(logits.device)], logits.float())
        if self.sampled:
            cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
            at = self._numbers[here, step][:, None].to(logits.device) * cumulative[:, -1:]
            # Right: a token of probability 0 is never the first whose sum exceeds the number.
            chosen = torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        else:
            chosen = scores.argmax(dim=-1)
        if self._penalised:
            new = self._seen[:, :1].clone()
            new[here.to(new.device), 0] = chosen
            self._seen = torch.cat([self._seen, new], dim=1)
        return chosen


def _warpers(settings: Sampling) -> Any:
    """Those of transformers, in its order; an empty list does nothing."""
    import transformers

    found: list[Any] = []
    if settings.repetition_penalty != 1:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature > 0:
        if settings.temperature != 1:
            found.append(transformers.TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k is not None:
            found.append(transformers.TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            found.append(transformers.TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            found.append(transformers.MinPLogitsWarper(settings.min_p))
    return transformers.LogitsProcessorList(found)


def _row_seed(ids: tuple[int, ...], seed: int, sample: int) -> int:
    """Seed of one text: neither batch nor order matters."""
    digest = hashlib.sha256(f"{seed}:{sample}:{ids}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
