"""Let steering vectors and LoRA adapters act on a model, all rows alike or a different one in every row.

    with attached(model, adapter.scaled(0.5)):      # a transformers model, a bridge or a HookedTransformer
        answers = generate(model, prompts)          # everything inside sees the adapted model

Adapters nest (several at once add up) and combine with interventions, which act after them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.attachment import edited_modules, edited_sites
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.direction import Direction


@contextmanager
def attached(model: Any, *adapters: Adapter) -> Iterator[None]:
    """Let adapters act on every pass of the model while the block runs; removed also on errors.

    Args:
        model: transformers model, bridge or HookedTransformer.
        adapters: their effects add up; gradients flow to their tensors.

    Raises:
        LensError: layers, modules, sites or sizes that the model does not have.
    """
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(attached_rows(model, [adapter], None))
        yield


@contextmanager
def attached_rows(model: Any, adapters: Sequence[Adapter], owner: Int[Tensor, " row"] | None) -> Iterator[None]:
    """Let row i of every pass be changed by `adapters[owner[i]]`: many variants of a model in one pass.

    Args:
        model: as in `attached`.
        adapters: of one kind, at the same places.
        owner: index per row of the batch; None gives every row the only adapter.

    Raises:
        LensError: adapters of different kinds or places, or what does not fit the model.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if type(other) is not type(first) or other.tensors().keys() != first.tensors().keys():
            raise LensError(f"{first!r} and {other!r} act at different places: run them apart")
    if isinstance(first, Direction):
        vectors: list[Any] = list(adapters)
        if len({adapter.site for adapter in vectors}) > 1:
            raise LensError("directions of different sites: run them apart")
        sites = {(i, first.site): _adding([x[i] for x in vectors], owner) for i in first.layers}
        with edited_sites(model, sites):
            yield
        return
    loras: list[Any] = list(adapters)
    places = {
        place: _low_rank([x.a[place] for x in loras], [x.b[place] for x in loras], [x.scale for x in loras], owner)
        for place in first.a
    }
    with edited_modules(model, places):
        yield


def _adding(vectors: Sequence[Tensor], owner: Tensor | None) -> Callable[[Tensor], Tensor]:
    table = torch.stack(list(vectors))
    rows = table if owner is None else table[owner.to(table.device)]  # [row or 1, d]

    def edit(activation: Tensor) -> Tensor:
        if rows.shape[-1] != activation.shape[-1]:
            raise LensError(f"the steering vector has width {rows.shape[-1]}, the activation {activation.shape[-1]}")
        return activation + rows[:, None].to(activation.device, activation.dtype)

    return edit


def _low_rank(
    a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], owner: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    narrow, wide, scale = torch.stack(list(a)), torch.stack(list(b)), torch.tensor(scales)  # never rounded to bfloat16
    if owner is not None:
        chosen = owner.to(narrow.device)
        narrow, wide, scale = narrow[chosen], wide[chosen], scale[owner.to(scale.device)]

    def edit(inputs: Tensor, output: Tensor) -> Tensor:
        if (narrow.shape[-1], wide.shape[-2]) != (inputs.shape[-1], output.shape[-1]):
            raise LensError(
                f"the adapter maps {narrow.shape[-1]} to {wide.shape[-2]}, this module {inputs.shape[-1]} to "
                f"{output.shape[-1]}: it was made for another model"
            )
        down, up = narrow.to(output.device), wide.to(output.device)
        inner = inputs.to(down.dtype) @ down.transpose(1, 2)
        change = inner @ up.transpose(1, 2) * scale.to(output.device)[:, None, None]
        return output + change.to(output.dtype)

    return edit
