"""Fused projections on a bridge: q, k and v (or gate and up) read from the one module that computes them.

TransformerLens cuts a fused weight (GPT-2's c_attn, Phi-3's qkv_proj and gate_up_proj, NeoX's query_key_value) into
parts when it boots, and never calls the module again: a LoRA on it is ignored, and where the parts are copies, so is
training. Here each part calls the fused module and takes its columns, so that what acts on it acts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from piggyback_lens.models.views import adapter_layers

SPLITS = ("split_qkv_matrix", "split_gate_up_matrix")
"""Names under which TransformerLens' components keep the function that cuts their fused module."""


def read_fused_weights_live(bridge: Any) -> None:
    """Let every part of a fused projection compute with the fused module of the bridge's own tree."""
    for component in list(bridge.modules()):
        for name in SPLITS:
            split = getattr(component, name, None)
            if split is not None:
                _make_live(component, split, ("q", "k", "v") if "qkv" in name else ("gate", "in"))


def _make_live(component: Any, split: Any, names: tuple[str, ...]) -> None:
    owner = component.original_component
    bridges = [getattr(component, name) for name in names]
    total = sum(_n_out(part.original_component) for part in bridges)
    for key, child in list(owner.named_children()):
        fused = getattr(child, "_original_component", child)
        if _n_out(fused) != total:
            continue
        shared = [part.original_component.weight.untyped_storage() for part in bridges]
        own = _weight(fused)
        if fused not in adapter_layers(owner).values() and all(
            s.data_ptr() == own.untyped_storage().data_ptr() for s in shared
        ):
            return  # views of a weight that nothing is put on
        places = _places(owner, key, split, fused)
        run = _OneRun(fused, len(names))
        for part, columns in zip(bridges, places, strict=True):
            part.set_original_component(FusedPart(run, columns))
        return


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _transposed(module: Any) -> bool:
    """Whether the weight is [in, out], as in GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(getattr(module, "base_layer", module), Conv1D)


def _n_out(module: Any) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return 0
    return int(weight.shape[1 if _transposed(module) else 0])


def _places(owner: Any, key: str, split: Any, fused: Any) -> list[Int[Tensor, " columns"]]:
    """Which outputs of the fused module each part has: cut a module of the same shape whose rows are their numbers."""
    n_out = _n_out(fused)
    numbers = torch.arange(n_out, dtype=torch.float32)
    n_in = _weight(fused).numel() // n_out
    rows = numbers[:, None].expand(n_out, n_in)
    stand_in = nn.Module()
    stand_in.register_parameter("weight", nn.Parameter((rows.T if _transposed(fused) else rows).clone()))
    stand_in.register_parameter("bias", None if getattr(fused, "bias", None) is None else nn.Parameter(numbers))
    own = owner._modules[key]
    owner._modules[key] = stand_in
    try:
        parts = split(owner)
    finally:
        owner._modules[key] = own
    device = _weight(fused).device
    return [part.weight.detach()[:, 0].round().long().to(device) for part in parts]


class _OneRun:
    """The last output of a fused module, until each of its parts has had it."""

    def __init__(self, fused: nn.Module, n_parts: int) -> None:
        self.fused, self.n_parts = fused, n_parts
        self._key: Any = None
        self._output: Tensor | None = None
        self._given = 0

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        key = (x, x._version, torch.is_grad_enabled())
        same = self._key is not None and self._key[0] is x and self._key[1:] == key[1:]
        if not same or self._output is None:
            self._key, self._output, self._given = key, self.fused(x), 0
        self._given += 1
        output = self._output
        if self._given == self.n_parts:
            self._key = self._output = None
        return output


class FusedPart(nn.Module):
    """One projection of a fused module, as a linear layer: same input, some of its outputs."""

    def __init__(self, run: _OneRun, columns: Int[Tensor, " columns"]) -> None:
        """`run` is shared by the parts of one fused module; `columns` are the outputs of this one."""
        super().__init__()
        self._run = run
        first, n = int(columns[0]), len(columns)
        whole = torch.equal(columns, torch.arange(first, first + n, device=columns.device))
        self.columns: slice | Tensor = slice(first, first + n) if whole else columns

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... columns"]:
        """The outputs of the fused module that are this part's."""
        return self._run(x)[..., self.columns]

    @property
    def weight(self) -> Float[Tensor, "columns d_in"]:
        """Of the fused module without its adapters, for TransformerLens' own properties."""
        weight = _weight(self._run.fused)
        return (weight.T if _transposed(self._run.fused) else weight)[self.columns]

    @property
    def bias(self) -> Float[Tensor, " columns"] | None:
        """Of the fused module without its adapters."""
        bias = getattr(self._run.fused, "bias", None)
        return None if bias is None else bias[self.columns]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.weight.shape[0])
