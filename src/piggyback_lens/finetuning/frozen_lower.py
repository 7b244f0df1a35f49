"""What lies below the lowest trained layer is the frozen base: run it once per example, and start there.

    store = FrozenLower(model, start=15)
    with store.standing_in(batch):
        output = forward_step(model, batch)     # layers 0 to 14 are not run

The stored activations are those of the model as it is while they are computed, so nothing else that acts on
those layers may come or go later. They are kept in memory up to a budget, then in files. Each example has a pass
of its own: the last bits of a row depend on the rows beside it, and a resumed run meets it in another batch.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.packing import packing_of
from piggyback_lens.models.backends import CACHE_NAMES
from piggyback_lens.vectors.attachment import decoder_blocks

Ids = tuple[int, ...]


class _Reached(Exception):
    """Ends a pass at the layer whose input was wanted."""


class FrozenLower:
    """The residual stream at the input of one decoder block, by example.

    Attributes:
        model: a transformers model; of a bridge, the model inside.
        start: the first block that is run.
        budget_gb: memory for activations; what does not fit goes to files.
        passes: passes through the frozen part so far.
    """

    def __init__(self, model: nn.Module, start: int, *, budget_gb: float = 1.0) -> None:
        blocks = decoder_blocks(model)
        if not 0 < start < len(blocks):
            raise LensError(f"start {start}: this model has blocks 1 to {len(blocks) - 1} above a frozen one")
        if budget_gb < 0:
            raise LensError(f"budget_gb {budget_gb}: a number of at least 0")
        self.model, self.start, self.budget_gb = model, start, budget_gb
        self.blocks = blocks
        self.passes = 0
        self._kept: dict[Ids, Tensor] = {}
        self._filed: dict[Ids, Path] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._as_tuple = False
        config: Any = model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._kv_shape = getattr(config, "num_key_value_heads", None) or heads, width

    def __len__(self) -> int:
        return len(self._kept) + len(self._filed)

    @property
    def n_filed(self) -> int:
        """How many examples are in files."""
        return len(self._filed)

    def of(self, batch: TrainBatch) -> Float[Tensor, "row pos d_model"]:
        """The stored activations of a batch; padding is zero. Computes what is not there yet."""
        rows = _real_ids(batch)
        for ids in rows:
            if ids not in self._kept and ids not in self._filed:
                self._keep(ids, self._run(torch.tensor([ids], device=batch.ids.device))[0])
        found = [self._read(ids) for ids in rows]
        out = found[0].new_zeros((len(rows), batch.ids.shape[1], found[0].shape[-1]), device=batch.ids.device)
        for row, hidden in enumerate(found):
            out[row, : len(hidden)] = hidden.to(out.device)
        return out

    @contextmanager
    def standing_in(self, batch: TrainBatch) -> Iterator[None]:
        """While inside, passes over this batch start at block `start`, from the stored activations.

        Keys and values of the blocks below are placeholders: `forward_step`'s output holds none of them that
        may be used.

        Raises:
            LensError: the pass does not ask for as many tokens as are stored.
        """
        whole = self.of(batch)
        shared = batch.prefix_length if batch.share_prefix else 0
        packing = packing_of(self.model, batch)
        waiting = [whole[:1, :shared], whole[:, shared:]] if shared else [whole]
        if packing is not None:
            waiting = packing.pack(whole)

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not waiting or waiting[0].shape != hidden.shape:
                stored = [tuple(x.shape) for x in waiting]
                raise LensError(f"a pass of {tuple(hidden.shape)} where {stored} is stored: set cache_below=False")
            own = waiting.pop(0).to(hidden.dtype)
            return ((own, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": own})

        handle = self.blocks[self.start].register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        # A bridge wraps each block; others (accelerate) set a forward of their own on it, which has to come back.
        lower = [getattr(block, "_original_component", block) for block in list(self.blocks)[: self.start]]
        before = [vars(block).get("forward") for block in lower]
        try:
            for number, block in enumerate(lower):
                vars(block)["forward"] = self._passed_by(number)
            yield
        finally:
            handle.remove()
            for block, own in zip(lower, before, strict=True):
                del vars(block)["forward"]
                if own is not None:
                    vars(block)["forward"] = own

    def _passed_by(self, number: int) -> Any:
        """The forward of a block that is not run: it only tells the cache how long the pass is, for the masks."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
            if cache is None:
                cache = next((value for value in args[1:] if hasattr(value, "get_seq_length")), None)
            if cache is not None:
                heads, width = self._kv_shape
                nothing = hidden.new_zeros(()).expand(len(hidden), heads, hidden.shape[1], width)
                cache.update(nothing, nothing, number)
            return (hidden,) if self._as_tuple else hidden

        return forward

    def _run(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_model"]:
        """The input of block `start`."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        def returned(_: nn.Module, _args: Any, output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)

        handles = [
            self.blocks[self.start - 1].register_forward_hook(returned),
            self.blocks[self.start].register_forward_pre_hook(stop, with_kwargs=True, prepend=True),
        ]
        try:
            with torch.no_grad(), suppress(_Reached):
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.passes += 1
        return found[0].detach()

    def _keep(self, ids: Ids, hidden: Tensor) -> None:
        from safetensors.torch import save_file

        size = hidden.numel() * hidden.element_size()
        if self._bytes + size <= self.budget_gb * 1e9:
            self._bytes += size
            self._kept[ids] = hidden
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="piggyback_lens_")
        path = Path(self._folder.name) / f"{len(self._filed)}.safetensors"
        save_file({"hidden": hidden.cpu().contiguous()}, path)
        self._filed[ids] = path

    def _read(self, ids: Ids) -> Float[Tensor, "pos d_model"]:
        from safetensors.torch import load_file

        return self._kept[ids] if ids in self._kept else load_file(self._filed[ids])["hidden"]


def _real_ids(batch: TrainBatch) -> list[Ids]:
    lengths = batch.attention_mask.sum(1).tolist()
    return [tuple(row[:n]) for row, n in zip(batch.ids.tolist(), lengths, strict=True)]
