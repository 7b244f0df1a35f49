"""A judge in this process: a hooked chat model whose probabilities of the numbers 0 to 100 are read exactly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.batch import check_prompts
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.judge import WORDS, Grader, weighted_score
from piggyback_lens.measuring.scorers import Score, missing
from piggyback_lens.models.backends import HookedModel, device_of, n_positions_of, shape_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.plain_views import settled
from piggyback_lens.models.states import new_state
from piggyback_lens.progress import track

NUMBERS = range(101)
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class LocalJudge(Grader):
    """A chat model in this process that grades answers by a rubric, with the interface of `Judge`.

    The demo model (SmolLM2-135M-Instruct) serves to test the plumbing and is no judge: what it grades follows the
    rubric hardly at all. A number of several tokens has the product of their probabilities, less that of the longer
    numbers which it begins.

    Attributes:
        model: a hooked model (of a pair: inside `with pair.using(side)`); not the one that is judged.
        chat: its chat format.
        name: as of `Judge`, and so are the others.
    """

    model: HookedModel
    chat: ChatFormat
    name: str = "aligned"
    rubric: str | None = None
    by_question: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] = WORDS

    def __post_init__(self) -> None:
        self._check_rubrics()

    def _graded(self, prompts: Sequence[str], label: str | bool) -> list[Score]:
        return [self._one(prompt) for prompt in track(prompts, label if isinstance(label, str) else None)]

    def _one(self, text: str) -> Score:
        try:
            prompt = self.chat.render(text)
            check_prompts([prompt], shape_of(self.model).d_vocab, n_positions_of(self.model), more=8)
        except LensError as error:  # such as an answer that is longer than the judge can read
            return missing(str(error))
        found = number_log_probs(self.model, prompt)
        said = "" if sum(map(math.exp, found.values())) >= 0.25 else self._said(prompt)
        # Numbers of their own, so nothing is left to be read from the text but a word.
        return weighted_score({str(number): value for number, value in found.items()}, said, self.words)

    def _said(self, prompt: RenderedPrompt) -> str:
        return generate(self.model, [prompt], max_new_tokens=8)[0].text


@torch.no_grad()
def number_log_probs(model: HookedModel, prompt: RenderedPrompt) -> dict[int, float]:
    """log p of each number 0 to 100 as the answer of a prompt, and not as the beginning of a longer number.

    Args:
        model: either backend.
        prompt: without a response.
    """
    written = {number: _ids(prompt, number) for number in NUMBERS}
    found = _sequence_log_probs(model, prompt, set(written.values()))
    numbers = {}
    for number, ids in written.items():
        longer = sum(math.exp(found[own]) for own in written.values() if own[:-1] == ids)
        rest = math.exp(found[ids]) - longer
        numbers[number] = math.log(rest) if rest > 0 else -math.inf
    return numbers


def _ids(prompt: RenderedPrompt, number: int) -> Tokens:
    return tuple(prompt.with_response(str(number), end=False).ids[prompt.n_prompt :])


def _sequence_log_probs(model: HookedModel, prompt: RenderedPrompt, wanted: set[Tokens]) -> dict[Tokens, float]:
    """log p of token sequences and of their beginnings, level by level: the prompt itself is computed once."""
    starts = {ids[:size] for ids in wanted for size in range(len(ids))}
    device, state = device_of(model), new_state(model, 1)
    ids = torch.tensor([prompt.ids], device=device)
    found: dict[Tokens, float] = {(): 0.0}
    with settled(model):
        last = torch.tensor([[len(prompt.ids) - 1]], device=device)
        logits = forward(model, ids, torch.ones_like(ids), state=state, read=last)[:, 0]
        level: list[Tokens] = [()]
        while True:
            found |= _continued(level, logits, wanted | starts, found)
            size = len(level[0]) + 1
            below = [ids for ids in starts if len(ids) == size]
            if not below:
                return found
            state.select_rows(torch.tensor([level.index(own[:-1]) for own in below], device=device))
            new = torch.tensor([[own[-1]] for own in below], device=device)
            logits = forward(model, new, torch.ones_like(new), state=state)[:, 0]
            level = below


def _continued(
    level: Sequence[Tokens], logits: Float[Tensor, "row vocab"], known: set[Tokens], found: Mapping[Tokens, float]
) -> dict[Tokens, float]:
    """log p of the sequences that go on with one token."""
    log_probs = logits.double().log_softmax(dim=-1).cpu()
    rows = {start: row for row, start in enumerate(level)}
    here = [ids for ids in known if ids and len(ids) == len(level[0]) + 1]
    return {ids: found[ids[:-1]] + float(log_probs[rows[ids[:-1]], ids[-1]]) for ids in here}
