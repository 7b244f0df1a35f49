"""Where patched activations come from: one side's own run, by span.

The flow of a patch is always donor to recipient: *repair* is base to finetuned, *infect* finetuned to base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch

from piggyback_lens.conversations.batch import padded
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.activations import Activations
from piggyback_lens.interventions.hooks import Interventions, Record
from piggyback_lens.interventions.kinds import cache, patch
from piggyback_lens.interventions.placement import Placement, Row
from piggyback_lens.interventions.running import applied
from piggyback_lens.maths import norm_matched_random
from piggyback_lens.models.network import NOTHING, forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.words import DONOR, RECIPIENT, Flow, PostfixDonor, Side, Site

Series = Literal["patched", "identity control", "random control"]
IDENTITY: Final = "identity control"


def prefix_activations(
    pair: ModelPair,
    side: Side,
    prompt: RenderedPrompt,
    sites: Site | Sequence[Site],
    layers: Sequence[int] | None = None,
) -> Activations:
    """Activations of the prefix on one side, one row; they hold for every query of the same settings."""
    length = len(prompt.span("prefix"))
    batch = padded([prompt.ids[:length]])
    placement = Placement.in_rows([Row.of(prompt)], batch)
    keep = cache(sites, span="prefix", layers=layers, device=None)
    with torch.no_grad(), pair.using(side) as model, applied(model, placement, keep) as record:
        forward(model, batch.ids, batch.attention_mask, read=NOTHING)
    return record.activations_of("prefix")


def span_activations(
    pair: ModelPair,
    side: Side,
    prompts: Sequence[RenderedPrompt],
    span: str,
    sites: Site | Sequence[Site],
    *,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Activations:
    """Activations of a span on one side, one row per prompt, in order: donors for a patch on the same prompts."""
    keep = cache(sites, span=span, layers=layers, tokens=tokens)
    record = Record()
    with pair.using(side) as model, torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            rows = range(start, min(start + batch_size, len(prompts)))
            batch = batch_prompts([prompts[row] for row in rows], side="right")
            placement = Placement.of(batch, tuple(rows), len(prompts))
            with applied(model, placement, keep, record=record):
                forward(model, batch.ids, batch.attention_mask, read=NOTHING)
    return record.activations_of(span)


def kv_patch(
    pair: ModelPair,
    span: str,
    *,
    chat: ChatFormat,
    prompts: Sequence[RenderedPrompt] | None = None,
    flow: Flow = "repair",
    layers: Sequence[int] | None = None,
) -> Interventions:
    """Replace keys and values of a span by the donor's (2606.06667 eq. 1).

    Keys are taken before the rotary embedding, so that they serve at any position, and before a key norm
    where the model has one (Qwen3, Gemma 3): the recipient applies its own. A LoRA finetune leaves that norm
    as it is; where a full finetune changed it, the donor's `PrefixCache` is the exact keys and values.

    Args:
        pair: base and finetuned.
        span: "prefix" and "postfix" take the donor from the template with an empty query; other spans from
            the donor's own run on each prompt.
        chat: the settings under which the prompts were rendered.
        prompts: the prompts that will be run, in order; needed for spans other than prefix and postfix.
        flow: "repair" (base to finetuned) or "infect".
        layers: None for all.

    Raises:
        LensError: the span is empty for this template, or prompts are missing.

    Example:
        >>> repair = kv_patch(pair, "prefix", chat=chat)
        >>> with pair.using("finetuned") as model:
        ...     repaired = generate(model, prompts, interventions=repair, max_new_tokens=4)
    """
    donor_side = DONOR[check_flow(flow)]
    if span in ("prefix", "postfix"):
        empty = chat.empty_query()
        empty.span(span)
        return patch(span_activations(pair, donor_side, [empty], span, ("k", "v"), layers=layers))
    if not prompts:
        raise LensError(f"a patch of span {span!r} takes each prompt's own donor: give prompts=")
    return patch(span_activations(pair, donor_side, prompts, span, ("k", "v"), layers=layers))


def check_flow(flow: Flow) -> Flow:
    """Refuse anything but repair and infect."""
    if flow not in DONOR:
        raise LensError(f"flow {flow!r} is not known: choose 'repair' or 'infect'")
    return flow


@dataclass
class Donors:
    """Activations of both sides on the same prompts, computed once each, for any number of cells.

    Attributes:
        pair: base and finetuned.
        prompts: what will be run, in order.
        postfix: donor of postfix activations: each prompt's own run ("own_prompt"), or the template with an
            empty query, the same for every prompt ("empty_query").
        seed: of the random control.
    """

    pair: ModelPair
    prompts: Sequence[RenderedPrompt]
    postfix: PostfixDonor = "own_prompt"
    chat: ChatFormat | None = None
    seed: int = 0
    _kept: dict[tuple[str, str, Site], Activations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.postfix not in ("own_prompt", "empty_query"):
            raise LensError(f"postfix donor {self.postfix!r} is not known: choose 'own_prompt' or 'empty_query'")
        if self.postfix == "empty_query" and self.chat is None:
            raise LensError("postfix donors of the empty query need chat=, the settings the prompts were rendered with")

    def of(self, series: Series, flow: Flow, span: str, site: Site) -> Activations:
        """Activations of all layers that make a cell patched, an identity control or a random control."""
        if series == "identity control":
            return self._side(RECIPIENT[flow], span, site, "own_prompt")
        if series == "patched":
            return self._side(DONOR[flow], span, site, self.postfix)
        key = (f"random {flow}", span, site)
        if key not in self._kept:
            own = self._side(RECIPIENT[flow], span, site, "own_prompt")
            donor = self._side(DONOR[flow], span, site, self.postfix)
            self._kept[key] = displaced(own, donor, self.seed)
        return self._kept[key]

    def _side(self, side: Side, span: str, site: Site, postfix: PostfixDonor) -> Activations:
        key = (f"{side} {postfix}", span, site)
        if key not in self._kept:
            if span == "prefix":
                found = prefix_activations(self.pair, side, self.prompts[0], site)
            elif span == "postfix" and postfix == "empty_query":
                assert self.chat is not None
                found = span_activations(self.pair, side, [self.chat.empty_query()], span, site)
            else:
                found = span_activations(self.pair, side, self.prompts, span, site)
            self._kept[key] = found
        return self._kept[key]


def of_tokens(whole: Activations, tokens: Sequence[int]) -> Activations:
    """Some tokens of a span, by their index in it.

    Raises:
        LensError: a token that some row does not have.
    """
    shortest = min(whole.lengths)
    wrong = [token for token in tokens if not 0 <= token < shortest]
    if wrong or not tokens or whole.tokens is not None:
        raise LensError(f"token {wrong[:1] or list(tokens)} of span {whole.span!r}: choose from 0 to {shortest - 1}")
    values = {key: value[:, list(tokens)] for key, value in whole.values.items()}
    return replace(whole, tokens=tuple(tokens), values=values, lengths=(len(tokens),) * len(whole.lengths))


def displaced(own: Activations, donor: Activations, seed: int) -> Activations:
    """`own` moved by as much as the donor differs from it, token by token, but in random directions."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for key, value in own.values.items():
        gap = (donor[key] - value).float().cpu()
        noise = torch.stack([norm_matched_random(token, generator) for token in gap.flatten(0, 1)]).view_as(gap)
        values[key] = value + noise.to(value.device, value.dtype)
    return Activations(own.span, own.tokens, values, own.lengths)
