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
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.steps import plan_for
from piggyback_lens.models.backends import n_layers_of
from piggyback_lens.models.partial import begun_at, residual_at

Ids = tuple[int, ...]


class FrozenLower:
    """The residual stream at the input of one decoder block, by example.

    Attributes:
        model: a transformers model; of a bridge, the model inside.
        start: the first block that is run.
        budget_gb: memory for activations; what does not fit goes to files.
        passes: passes through the frozen part so far.
    """

    def __init__(self, model: nn.Module, start: int, *, budget_gb: float = 1.0) -> None:
        if not 0 < start < n_layers_of(model):
            raise LensError(f"start {start}: this model has blocks 1 to {n_layers_of(model) - 1} above a frozen one")
        if budget_gb < 0:
            raise LensError(f"budget_gb {budget_gb}: a number of at least 0")
        self.model, self.start, self.budget_gb = model, start, budget_gb
        self.passes = 0
        self._kept: dict[Ids, Tensor] = {}
        self._filed: dict[Ids, Path] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._in_tuple = False

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
                alone = torch.tensor([ids], device=batch.ids.device)
                residual, self._in_tuple = residual_at(self.model, alone, self.start)
                self.passes += 1
                self._keep(ids, residual[0])
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
        plan = plan_for(self.model, batch)
        waiting = [whole[:1, : plan.alone], whole[:, plan.alone :]] if plan.alone else [whole]
        if plan.packing is not None:
            waiting = plan.packing.pack(whole)
        with begun_at(self.model, self.start, waiting, in_tuple=self._in_tuple):
            yield

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
