"""Find conversations and the template's spans in batches that other people's collators made: ids, masks, labels only.

What is required of such a batch. Every conversation begins with the template's prefix, exactly; nothing is
searched for. It begins at the row's first unmasked token, or, where the batch has `position_ids`, wherever
they are 0 (packed rows hold several). For more than the prefix the first label that is not -100 has to be
the first response token, as completion-only training has it, and the postfix has to stand right before it; what lies
between prefix and postfix is the query. `ChatFormat` counts earlier turns to the prefix, and where they end is not to
be seen in token ids: whoever depends on that (`one_turn`) has rows with earlier turns refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt, Span
from piggyback_lens.conversations.tokens import fixed_ids
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.placement import Placement, Row

IGNORED = -100
"""The label of tokens that are not trained on."""


def check_prefixes(inputs: Mapping[str, Any], prompt: RenderedPrompt) -> Int[Tensor, "start 2"]:
    """Row and column at which each conversation of a batch begins; every one with the prefix of `prompt`.

    Raises:
        LensError: a row with another prefix, by its number and first differing token; no `input_ids`.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise LensError(
            "the batch has no input_ids of shape [row, position], which the penalty reads; adapt the collator"
        )
    starts = _starts(inputs, ids)
    wanted = torch.tensor(prompt.ids[: prompt.span("prefix").stop], device=ids.device)
    columns = starts[:, 1:] + torch.arange(len(wanted), device=ids.device)
    inside = columns < ids.shape[1]
    found = ids[starts[:, :1], columns.clamp(max=ids.shape[1] - 1)]
    wrong = (found != wanted) | ~inside
    if bool(wrong.any()):
        number = int(wrong.any(1).nonzero()[0])
        _refuse(prompt, number, int(starts[number, 0]), found[number][inside[number]].tolist())
    return starts


def _starts(inputs: Mapping[str, Any], ids: Int[Tensor, "row pos"]) -> Int[Tensor, "start 2"]:
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise LensError(f"attention_mask has shape {tuple(real.shape)}, expected that of input_ids {tuple(ids.shape)}")
    if positions is not None and positions.shape[-2:] == ids.shape:
        # [row, pos], or a first axis for several kinds of position
        places = positions.flatten(0, -3)[0] if positions.ndim > 2 else positions
        # Collators that flatten rows pad the end by position 0, without a mask.
        followed = (places != 0).flip(1).cumsum(1).flip(1) > 0
        first = (places == 0) & followed
    else:
        first = real.cumsum(1) == 1
    starts: Tensor = (first & real).nonzero()
    if len(set(starts[:, 0].tolist())) < len(ids):
        raise LensError("a row of the batch has no position at which a conversation begins; check its masks")
    return starts


def _refuse(prompt: RenderedPrompt, number: int, row: int, found: Sequence[int]) -> None:
    wanted = prompt.ids[: prompt.span("prefix").stop]
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
    shown = repr(prompt.tokenizer.decode([found[at]])) if at < len(found) else "the end of the row"
    raise LensError(
        f"row {row} of the batch (conversation {number}) does not begin with the reference's prefix: token {at} is "
        f"{shown}, expected {prompt.pieces[at]!r}; render the data with the template settings of prompt="
    )


def placement_in(inputs: Mapping[str, Any], prompt: RenderedPrompt) -> Placement:
    """Where in a batch the spans of its conversations are, packed or not, for interventions on the batch's own pass.

    Raises:
        LensError: as `conversations`; a row with several turns, whose prefix `ChatFormat` has elsewhere.
    """
    found, ids = conversations(inputs, prompt, whole=True, one_turn=True), inputs["input_ids"]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    starts = _starts(inputs, ids)
    columns = torch.arange(ids.shape[1], device=ids.device)
    after = (starts[:, :1] == starts[:, 0]) & (starts[:, 1:] < starts[:, 1])  # [conversation, later ones in its row]
    stops = torch.where(after, starts[:, 1], ids.shape[1]).min(dim=1).values
    inside = (columns >= starts[:, 1:]) & (columns < stops[:, None]) & real[starts[:, 0]]
    positions = torch.where(inside, columns - starts[:, 1:], -1).cpu()
    lines = tuple(starts[:, 0].tolist())
    return Placement(tuple(map(Row.of, found)), positions, positions, lines=lines)


def conversations(
    inputs: Mapping[str, Any], prompt: RenderedPrompt, *, whole: bool, one_turn: bool = False
) -> tuple[RenderedPrompt, ...]:
    """The conversations of a batch with completion-only labels: ids and spans, without their text.

    Args:
        inputs: what the collator made.
        prompt: any prompt of the template settings.
        whole: whether the responses are read too, and not the prompts alone. A response ends with its last label.
        one_turn: whether the border between prefix and query matters, which earlier turns would move.

    Raises:
        LensError: no labels, labels on the prompt, tokens within a response without a label, a row whose prefix or
            postfix is not that of `prompt`, or with `one_turn` one that has earlier turns.
    """
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    starts = check_prefixes(inputs, prompt).tolist()
    assert isinstance(ids, Tensor)
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        raise LensError("prompts and responses are found by the labels, and the batch has none beside its input_ids")
    tokens, kept = ids.tolist(), (labels != IGNORED).tolist()
    found = []
    for number, (row, start) in enumerate(starts):
        ahead = starts[number + 1] if number + 1 < len(starts) else [row + 1, 0]
        stop = ahead[1] if ahead[0] == row else len(tokens[row])
        supervised = [at for at in range(start, stop) if kept[row][at]]
        n_prompt = supervised[0] - start if supervised else 0
        end = supervised[-1] + 1 if supervised else start
        if whole and len(supervised) != end - start - n_prompt:
            raise LensError(
                f"row {row} of the batch (conversation {number}) has tokens without a label between labels, and one "
                "response a conversation is read by penalties and gated adapters: make one row for each answer"
            )
        found.append(_conversation(prompt, tuple(tokens[row][start:end]), n_prompt, row))
        if one_turn:
            _refuse_earlier_turns(prompt, found[-1], row)
    return tuple(found)


def _refuse_earlier_turns(prompt: RenderedPrompt, found: RenderedPrompt, row: int) -> None:
    where, postfix = found.spans["query"], prompt.ids[prompt.spans["postfix"].start : prompt.n_prompt]
    query, size = found.ids[where.start : where.stop], len(postfix)
    marks = {*prompt.ids, *prompt.answer.end_ids, *prompt.answer.stop_ids} & fixed_ids(prompt.tokenizer)
    # Templates without marks of their own (User:, Assistant:) write the postfix again before an earlier answer.
    again = any(query[at : at + size] == postfix for at in range(len(query)))
    if again or (inside := next((token for token in query if token in marks), None)) is not None:
        shown = prompt.span_text("postfix") if again else prompt.tokenizer.decode([inside])
        raise LensError(
            f"row {row} of the batch has the template's {shown!r} between prefix and postfix: it holds earlier turns, "
            "which train() counts to the prefix, and nothing in token ids says where they end. Train on rows of one "
            "turn, or use train()"
        )


def _conversation(prompt: RenderedPrompt, ids: tuple[int, ...], n_prompt: int, row: int) -> RenderedPrompt:
    n_prefix, where = prompt.span("prefix").stop, prompt.spans["postfix"]
    postfix = prompt.ids[where.start : where.stop]
    end = n_prompt - len(postfix)
    if end < n_prefix or ids[end:n_prompt] != postfix:
        raise LensError(
            f"row {row} of the batch has its first label at token {n_prompt}, which does not stand behind the "
            f"template's postfix {prompt.span_text('postfix')!r}; label responses only, and nothing else"
        )
    borders = {"prefix": (0, n_prefix), "query": (n_prefix, end), "postfix": (end, n_prompt)}
    spans = {name: Span(name, *border) for name, border in (borders | {"response": (n_prompt, len(ids))}).items()}
    return replace(prompt, ids=ids, text="", pieces=(), query="", spans=spans, notes=())
