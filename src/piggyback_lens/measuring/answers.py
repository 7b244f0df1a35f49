"""What a patching experiment measures on each prompt: a contrast between two answers, or a generated behaviour."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.maths import token_log_probs
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.measuring.sampling import Sampling
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import shows
from piggyback_lens.words import Side


@dataclass(frozen=True, eq=False)
class AnswerContrast:
    """log p of the finetuned model's own answer minus log p of the base's own, each a mean over its tokens.

    High on the finetuned model and low on the base; a patch moves it from one to the other. Teacher-forced:
    exact, differentiable, one pass. In nats per token.

    Attributes:
        towards: each prompt with the finetuned model's answer.
        against: the same prompts with the base's answer.
    """

    towards: Sequence[RenderedPrompt]
    against: Sequence[RenderedPrompt]
    name = "answer contrast"
    unit = "nats per token"

    def __post_init__(self) -> None:
        for name in ("towards", "against"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.towards or len(self.towards) != len(self.against):
            n, m = len(self.towards), len(self.against)
            raise LensError(f"{n} responses against {m}: give one of each per prompt, at least one")
        for i, (a, b) in enumerate(zip(self.towards, self.against, strict=True)):
            if "response" not in a.spans or "response" not in b.spans:
                raise LensError(f"prompt {i} has no response to be scored: use prompt.with_response(...)")
            if a.ids[: a.n_prompt] != b.ids[: b.n_prompt]:
                raise LensError(f"prompt {i}: the two answers answer different prompts; give them in the same order")

    @classmethod
    @shows("contrast")
    def of(
        cls,
        pair: ModelPair,
        prompts: Sequence[RenderedPrompt],
        *,
        max_new_tokens: int = 24,
        batch_size: int = 40,
        progress: bool | str = True,
    ) -> "AnswerContrast":
        """Let both models answer (greedily), and contrast the answers."""
        sides: tuple[Side, Side] = ("finetuned", "base")
        answers = []
        for side in sides:
            with pair.using(side) as model:
                found = generate(
                    model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=f"{side} answers"
                )
            answers.append(tuple(answer.completed() for answer in found))
        return cls(*answers)

    @property
    def rows(self) -> tuple[RenderedPrompt, ...]:
        """What is scored: all of `towards`, then all of `against`."""
        return (*self.towards, *self.against)

    def __len__(self) -> int:
        return len(self.towards)

    def combine(self, scores: Float[Tensor, "*cell row"]) -> Float[Tensor, "*cell prompt"]:
        """The contrast, from mean log p of every row."""
        return scores[..., : len(self)] - scores[..., len(self) :]

    def to_dict(self) -> dict[str, Any]:
        """What identifies it, for resumed runs."""
        return {"name": self.name, "unit": self.unit, "ids": [list(row.ids) for row in self.rows]}


@dataclass(frozen=True, eq=False)
class GeneratedBehaviour:
    """A behaviour of the generated answer: slower than a contrast, and what people see.

    Attributes:
        behaviour: a `Behaviour`, or the name of one.
        max_new_tokens: per answer.
        batch_size: rows per batch.
        sampling: how tokens are chosen; None is greedy. Several answers to a prompt: give prompts of
            `ChatFormat.ask(questions, samples=10)`.
    """

    behaviour: Behaviour
    max_new_tokens: int = 60
    batch_size: int = 40
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "behaviour", get_behaviour(self.behaviour))

    @property
    def name(self) -> str:
        """The label of the behaviour, for axes and tables."""
        return self.behaviour.label

    @property
    def unit(self) -> str:
        """The unit of the behaviour, such as "words" or "rate 0..1"."""
        return self.behaviour.unit

    def to_dict(self) -> dict[str, Any]:
        """What identifies it, for resumed runs."""
        facts = {"name": self.behaviour.name, "unit": self.unit, "max_new_tokens": self.max_new_tokens}
        return facts | ({} if self.sampling is None else {"sampling": asdict(self.sampling)})


Measure = AnswerContrast | GeneratedBehaviour


def mean_log_prob(row: RenderedPrompt, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
    """Mean log p, in nats per token, of a row's response under the logits that predict it."""
    targets = torch.tensor(row.ids[row.n_prompt :], device=logits.device)
    return token_log_probs(logits[None].float(), targets[None])[0].mean()
