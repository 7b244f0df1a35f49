"""Score texts under many variants of one model: steered at several strengths, adapted, ablated.

The unchanged model is run once for each batch of texts, and its logits serve all variants of that batch.
Adapters of one kind are rows of one pass, which share everything below the lowest layer they change.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.conversations.batch import Batch, as_prompts, padded
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Intervention, Interventions
from piggyback_lens.interventions.placement import OPEN, Placement, Row
from piggyback_lens.interventions.running import applied
from piggyback_lens.maths import kl_per_token, token_log_probs
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.forking import Lineage, forking
from piggyback_lens.models.network import forward
from piggyback_lens.progress import counting
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.adapting import attached_rows
from piggyback_lens.vectors.direction import Direction

Variant = Adapter | Intervention | Interventions


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids of which those from `start` on are scored, each predicted from what stands before it."""

    ids: tuple[int, ...]
    start: int = 1
    prompt: RenderedPrompt | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise LensError(f"a text of {len(self.ids)} tokens scored from token {self.start}: nothing to score")

    @property
    def n_scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.start


def texts_hash(texts: Sequence[Text]) -> str:
    """16 hex digits of ids and scored tokens."""
    return hashlib.sha256(repr([(text.ids, text.start) for text in texts]).encode()).hexdigest()[:16]


def response_texts(prompts: Sequence[RenderedPrompt]) -> list[Text]:
    """Conversations of which the response is scored.

    Raises:
        LensError: a prompt without a response, or none at all.
    """
    if any("response" not in prompt.spans for prompt in as_prompts(prompts)):
        raise LensError("every conversation needs a response to be scored: use prompt.with_response(...)")
    return [Text(prompt.ids, prompt.n_prompt, prompt) for prompt in prompts]


def variant_nll(
    model: HookedModel, texts: Sequence[Text], variants: Sequence[Variant | None], *, rows_per_pass: int = 32
) -> Float[Tensor, "variant text"]:
    """Mean negative log-likelihood of every text's scored tokens under every variant, in nats per token.

    Args:
        model: either backend.
        texts: what to score.
        variants: None is the unchanged model.
        rows_per_pass: texts times variants that go through the model together; bounds the memory.

    Raises:
        LensError: nothing to score, or what does not fit the model.
    """
    found = torch.zeros(len(variants), len(texts), dtype=torch.float64)
    for pass_ in _passes(model, texts, variants, rows_per_pass):
        scores = token_log_probs(pass_.logits, pass_.targets)
        for row, text in enumerate(pass_.texts):
            found[pass_.variant, text] = -scores[row, : texts[text].n_scored].double().mean()
    return found


def variant_kl(
    model: HookedModel, texts: Sequence[Text], variants: Sequence[Variant | None], *, rows_per_pass: int = 32
) -> list[list[Float[Tensor, " token"]]]:
    """KL(unchanged || variant) at every scored token, in nats: [variant][text]. The unchanged model gives 0.

    Args and errors as `variant_nll`.
    """
    found = [[torch.zeros(text.n_scored, dtype=torch.float64) for text in texts] for _ in variants]
    changed = [number for number, variant in enumerate(variants) if variant is not None]
    for pass_ in _passes(model, texts, [None, *(variants[number] for number in changed)], rows_per_pass):
        if pass_.variant == 0:
            base = pass_.logits
            continue
        for row, text in enumerate(pass_.texts):
            n = texts[text].n_scored
            kl = kl_per_token(base[row : row + 1, :n], pass_.logits[row : row + 1, :n])[0]
            found[changed[pass_.variant - 1]][text] = kl.double().cpu()
    return found


@dataclass(frozen=True, eq=False)
class _Pass:
    """Logits of one variant on one batch of texts, at the positions that predict scored tokens."""

    variant: int
    texts: tuple[int, ...]
    logits: Float[Tensor, "text token vocab"]
    targets: Int[Tensor, "text token"]


@dataclass(frozen=True, eq=False)
class _Batch(Batch):
    """Right-padded texts, and which columns predict what is scored."""

    texts: tuple[Text, ...]
    read: Int[Tensor, "text token"]
    targets: Int[Tensor, "text token"]

    @classmethod
    def of(cls, texts: Sequence[Text]) -> "_Batch":
        rows, scored = padded([text.ids for text in texts]), max(text.n_scored for text in texts)
        # Short rows repeat their last column; what is computed there is not used.
        steps = torch.arange(scored)
        read = torch.stack([(text.start - 1 + steps).clamp(max=len(text.ids) - 2) for text in texts])
        return cls(rows.ids, rows.attention_mask, tuple(texts), read, rows.ids.gather(1, read + 1))

    def placement(self) -> Placement:
        """Where interventions act: spans of the conversation, or `all` of a plain text."""
        rows = tuple(Row.of(t.prompt) if t.prompt else Row({"all": (0, OPEN)}, t.start) for t in self.texts)
        return Placement.in_rows(rows, self)


def _passes(
    model: HookedModel, texts: Sequence[Text], variants: Sequence[Variant | None], rows_per_pass: int
) -> Iterator[_Pass]:
    """Every variant on every batch of texts; all variants of one batch before the next batch."""
    if not texts or rows_per_pass < 1:
        raise LensError(f"{len(texts)} texts, rows_per_pass {rows_per_pass}: each must be at least 1")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    size = max(1, min(len(texts), rows_per_pass))
    with counting(len(texts) * len(variants)) as advance:
        for at in range(0, len(order), size):
            chosen = tuple(order[at : at + size])
            batch = _Batch.of([texts[i] for i in chosen])
            together = max(1, rows_per_pass // len(chosen))
            for kind, group in groupby(range(len(variants)), key=lambda i: _kind(variants[i])):
                numbers = list(group)
                step = together if kind else 1
                for start in range(0, len(numbers), step):
                    part = numbers[start : start + step]
                    run = _runner([variants[i] for i in part])
                    with torch.no_grad():
                        logits = run(model, batch).view(len(part), len(chosen), *batch.targets.shape[1:], -1)
                    for variant, own in zip(part, logits, strict=True):
                        yield _Pass(variant, chosen, own, batch.targets.to(own.device))
                        advance(len(chosen))


def _kind(variant: Variant | None) -> tuple[object, ...]:
    """Variants of one kind can be rows of one pass; an empty kind cannot."""
    if isinstance(variant, Direction):
        return ("vector", variant.site, *variant.layers)
    if isinstance(variant, LoRAAdapter):
        return ("lora", variant.rank, *variant.tensors())
    return ()


def _runner(variants: Sequence[Variant | None]) -> Callable[[HookedModel, _Batch], Tensor]:
    adapters = [variant for variant in variants if isinstance(variant, Direction | LoRAAdapter)]
    if adapters:
        return lambda model, batch: _adapter_logits(model, batch, adapters)
    only = variants[0]
    assert not isinstance(only, Direction | LoRAAdapter)

    def run(model: HookedModel, batch: _Batch) -> Tensor:
        with applied(model, batch.placement(), only):
            return forward(model, batch.ids, batch.attention_mask, read=batch.read)

    return run


def _adapter_logits(
    model: HookedModel, batch: _Batch, adapters: Sequence[Adapter]
) -> Float[Tensor, "variant_text token vocab"]:
    """The batch once for each adapter, all as rows of one pass; what lies below the adapters is computed once."""
    count, n = len(adapters), len(batch.texts)
    owner, read = torch.arange(count).repeat_interleave(n), batch.read.repeat(count, 1)
    lowest = min(layer for adapter in adapters for layer in adapter.layers)
    with ExitStack() as stack:
        stack.enter_context(attached_rows(model, adapters, owner))
        if lowest == 0 or count == 1:
            return forward(model, batch.ids.repeat(count, 1), batch.attention_mask.repeat(count, 1), read=read)
        # The first adapter's rows run from the start; the others' are copies of them, made below any change.
        parents = [row % n for row in range(n, count * n)]
        lineage, _ = Lineage.of(n, [lowest] * len(parents), parents)
        stack.enter_context(forking(model, lineage))
        return forward(model, batch.ids, batch.attention_mask, read=read)
