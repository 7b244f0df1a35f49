"""Hooked models and the pair of base and finetuned.

`hook_model` turns a transformers model into a hooked one and proves that both give the same logits;
`ModelPair` holds the two sides of an experiment, with one copy of the weights where an adapter is all
that differs.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import (
    Backend,
    HookedModel,
    Shape,
    backend_of,
    device_of,
    dtype_of,
    forward,
    is_hooked_model,
    shape_of,
)
from piggyback_lens.models.booting import boot_bridge, build_hooked, share_equal_parameters
from piggyback_lens.models.sources import (
    adapter_folder,
    attach_adapter,
    default_model,
    is_adapter_folder,
    load_causal_lm,
    load_tokenizer,
)

Side = Literal["base", "finetuned"]
SIDES: tuple[Side, Side] = ("base", "finetuned")
Source = Any
"""A hub id, a local folder, a GGUF file, a PEFT adapter folder, a transformers model, or a hooked model."""

PARITY_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Largest |hooked - transformers| logit, as a fraction of the largest |logit|, that is accepted at load."""


def hook_model(
    hf_model: Any,
    tokenizer: Any,
    *,
    backend: Backend = "bridge",
    name: str | None = None,
    reference: Any = None,
) -> HookedModel:
    """Make a hooked model of a transformers causal language model, and check that it is the same function.

    Args:
        hf_model: the model; for a PEFT model pass `peft_model.get_base_model()` (its adapter stays live on
            the bridge) or a merged copy. With backend "bridge" it is rewired in place and shares weights.
        tokenizer: kept as it is, for the hooked model's own convenience functions.
        backend: "bridge" (TransformerBridge) or "hooked" (HookedTransformer, transformer-lens 3.9 only).
        name: shown in messages.
        reference: the transformers model whose logits are expected; default `hf_model` itself.

    Raises:
        LensError: the architecture is unsupported, or the logits differ; the message has the figures.
    """
    if backend not in ("bridge", "hooked"):
        raise LensError(f"backend {backend!r} is not known: choose 'bridge' or 'hooked'")
    if hasattr(hf_model, "peft_config") and hasattr(hf_model, "get_base_model"):
        raise LensError("got a PeftModel: pass peft_model.get_base_model(), or load the pair with adapter=")
    shown = name or getattr(hf_model, "name_or_path", "") or type(hf_model).__name__
    rows = _probe_rows(int(hf_model.config.get_text_config().vocab_size))
    device = next(hf_model.parameters()).device
    with torch.no_grad():
        expected = [(reference or hf_model)(input_ids=row[None].to(device)).logits[0] for row in rows]
    model = boot_bridge(hf_model, tokenizer, shown) if backend == "bridge" else build_hooked(hf_model, tokenizer, shown)
    _check_parity(model, rows, expected, shown)
    return model


def _probe_rows(vocab: int) -> list[Int[Tensor, " _"]]:
    """Two fixed rows of different lengths, so that padding and positions are part of the check."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab, (length,), generator=generator) for length in (24, 17)]


def _check_parity(
    model: HookedModel, rows: list[Int[Tensor, " _"]], expected: list[Float[Tensor, "_ vocab"]], name: str
) -> None:
    width, device = max(len(row) for row in rows), device_of(model)
    for side in ("left", "right"):
        ids, mask = torch.zeros((2, len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            columns = slice(width - len(row), None) if side == "left" else slice(0, len(row))
            ids[i, columns], mask[i, columns] = row, 1
        with torch.no_grad():
            logits = forward(model, ids.to(device), mask.to(device))
        for i, reference in enumerate(expected):
            ours = logits[i][mask[i].bool().to(logits.device)].float()
            theirs = reference.float().to(ours.device)
            difference = float((ours[:, : theirs.shape[1]] - theirs).abs().max() / theirs.abs().max())
            allowed = PARITY_TOLERANCE[dtype_of(model)]
            if not difference <= allowed:
                raise LensError(
                    f"{backend_of(model)} model of {name} differs from transformers by {difference:.1e} of the largest "
                    f"logit ({side}-padded probe, {allowed:.0e} allowed for {dtype_of(model)}): "
                    "use the other backend, or report the architecture"
                )


@dataclass(frozen=True)
class Identity:
    """Says which function a model is: its sizes, and its logits on fixed tokens.

    Logits rather than a hash of weights, because the same model has differently named and folded
    weights as transformers model, bridge, merged adapter and HookedTransformer.
    """

    name: str
    shape: Shape
    probe: tuple[float, ...]

    def matches(self, other: "Identity", tolerance: float = 2e-3) -> bool:
        """Same sizes, and probe logits equal to `tolerance` of the largest."""
        if self.shape != other.shape or len(self.probe) != len(other.probe):
            return False
        scale = max(map(abs, self.probe + other.probe))
        return all(abs(a - b) <= tolerance * scale for a, b in zip(self.probe, other.probe, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"name": self.name, "shape": asdict(self.shape), "probe": list(self.probe)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Identity":
        """Inverse of `to_dict`."""
        return cls(data["name"], Shape(**data["shape"]), tuple(data["probe"]))


def identify(model: HookedModel, name: str = "") -> Identity:
    """The identity of a hooked model in its present state (adapter on or off)."""
    shape = shape_of(model)
    ids = ((torch.arange(12) * 9973 + 11) % shape.d_vocab).to(device_of(model))[None]
    wanted = torch.linspace(0, shape.d_vocab - 1, 48).long()
    with torch.no_grad():
        last = torch.tensor([[ids.shape[1] - 1]], device=ids.device)
        logits = forward(model, ids, torch.ones_like(ids), read=last)[0, 0]
    return Identity(name, shape, tuple(round(x, 5) for x in logits[wanted.to(logits.device)].float().tolist()))


class ModelPair:
    """A base model and a narrow finetune of it, as hooked models.

    Use `with pair.using("base") as model:` (or `"finetuned"`); inside, `model` is an ordinary
    TransformerLens model. Where the two differ by an adapter on the bridge backend they are one model
    whose adapter is switched, so a model must not be kept beyond its `with` block.
    """

    def __init__(
        self,
        base: HookedModel,
        finetuned: HookedModel | None = None,
        *,
        tokenizer: Any,
        peft_model: Any = None,
        names: tuple[str, str] = ("base", "finetuned"),
    ) -> None:
        """Make a pair of hooked models that you built; `ModelPair.load` builds them for you.

        Args:
            base: either backend.
            finetuned: the other side; None only where `peft_model` is given.
            tokenizer: the original tokenizer, with its chat template.
            peft_model: the PEFT model whose adapter, switched on, makes `base` the finetuned model.
            names: for figures and results.

        Raises:
            LensError: sizes or backends differ, or the tokenizer has no chat template.
        """
        if (finetuned is None) == (peft_model is None):
            raise LensError("a pair needs either a finetuned model or an adapter, got neither or both")
        self._models: dict[Side, HookedModel] = {"base": base, "finetuned": finetuned or base}
        self._peft = peft_model
        self._active: Side | None = None
        self.tokenizer = tokenizer
        self.names: dict[Side, str] = {"base": names[0], "finetuned": names[1]}
        self.backend: Backend = backend_of(base)
        self.shape = shape_of(base)
        if finetuned is not None:
            _require_same("sizes", self.shape, shape_of(finetuned))
            _require_same("backend", self.backend, backend_of(finetuned))
        self._identities: dict[Side, Identity] = {}
        if peft_model is not None:  # now, because inside a block that uses one side the other is out of reach
            for side in SIDES:
                self.identity(side)

    def __repr__(self) -> str:
        """One line: names, backend, sizes."""
        return (
            f"ModelPair({self.names['base']!r}, {self.names['finetuned']!r}, backend={self.backend!r}, "
            f"{self.shape.n_layers} layers, {self.device}, {self.dtype})"
        )

    @classmethod
    def load(
        cls,
        base: Source = None,
        finetuned: Source = None,
        adapter: str | Path | None = None,
        *,
        backend: Backend = "bridge",
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        offline: bool = False,
        names: tuple[str, str] | None = None,
    ) -> "ModelPair":
        """Load both sides, hook them, and check that they belong together.

        Args:
            base: hub id, local folder, GGUF file, transformers model or hooked model; None for the demo model.
            finetuned: a whole model of the same kinds, a PEFT adapter folder, or a PeftModel (whose base
                model is then the base side, so `base` is left out).
            adapter: a PEFT adapter folder, or the hub id of one; the base given here is used, whatever base the
                adapter names.
            backend: "bridge" or "hooked". The bridge keeps one copy of the weights and switches the adapter;
                "hooked" holds a second model that shares the parameters which the adapter left alone.
            tokenizer: needed with models that are given as objects.
            device: default cuda if there is one, else cpu.
            dtype: of the weights that are loaded; objects keep theirs.
            offline: make no connection at all.
            names: of base and finetuned, for figures and results; default from the sources.

        Raises:
            LensError: anything that is not loadable or does not fit, in one line.
        """
        if (finetuned is None) == (adapter is None):
            raise LensError("give exactly one of finetuned= and adapter=")
        if is_adapter_folder(finetuned):
            finetuned, adapter = None, finetuned
        if is_hooked_model(base) and is_hooked_model(finetuned):
            return cls(base, finetuned, tokenizer=_given_tokenizer(tokenizer, base), names=names or SIDES)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        settings = {"device": where, "dtype": dtype, "offline": offline}
        if hasattr(finetuned, "get_base_model"):
            if base is not None:
                raise LensError("finetuned is a PeftModel, which holds its own base: leave base= out")
            return cls._from_peft(
                finetuned.eval(), _given_tokenizer(tokenizer, finetuned), backend, names or ("base", "adapter")
            )
        if base is None:
            base = default_model(offline=offline)
        hf_base, base_tokenizer = _side(base, tokenizer, settings)
        name = _name(base)
        if adapter is not None:
            peft_model = attach_adapter(hf_base, adapter_folder(adapter, offline=offline))
            return cls._from_peft(peft_model, base_tokenizer, backend, names or (name, _name(adapter)))
        hf_tuned, tuned_tokenizer = _side(finetuned, tokenizer, settings)
        _check_tokenizers(base_tokenizer, tuned_tokenizer)
        names = names or (name, _name(finetuned))
        hooked_base = hook_model(hf_base, base_tokenizer, backend=backend, name=names[0])
        hooked_tuned = hook_model(hf_tuned, base_tokenizer, backend=backend, name=names[1])
        return cls(hooked_base, hooked_tuned, tokenizer=base_tokenizer, names=names)

    @classmethod
    def _from_peft(cls, peft_model: Any, tokenizer: Any, backend: Backend, names: tuple[str, str]) -> "ModelPair":
        if backend == "bridge":
            # A fresh adapter is the identity, so parity is checked with it on: the LoRA path included.
            model = hook_model(peft_model.get_base_model(), tokenizer, backend=backend, name=names[0])
            return cls(model, tokenizer=tokenizer, peft_model=peft_model, names=names)
        # HookedTransformer copies weights: the base's from under the adapter, the finetuned's from a merged copy.
        merged = copy.deepcopy(peft_model).merge_and_unload()
        tuned = hook_model(merged, tokenizer, backend=backend, name=names[1], reference=peft_model)
        del merged
        with peft_model.disable_adapter():
            base = hook_model(peft_model.get_base_model(), tokenizer, backend=backend, name=names[0])
        share_equal_parameters(tuned, base)
        return cls(base, tuned, tokenizer=tokenizer, names=names)

    @contextmanager
    def using(self, side: Side) -> Iterator[HookedModel]:
        """The hooked model of one side, for the length of the block.

        Raises:
            LensError: unknown side, or the other side of a shared model is in use.
        """
        if side not in SIDES:
            raise LensError(f"side {side!r} is not known: choose 'base' or 'finetuned'")
        if self._peft is None:
            yield self._models[side]
            return
        if self._active not in (None, side):
            raise LensError(f"the {side} side was asked inside a block that uses {self._active}: they share one model")
        outer, self._active = self._active, side
        try:
            if side == "finetuned":
                yield self._models[side]
            else:
                with self._peft.disable_adapter():
                    yield self._models[side]
        finally:
            self._active = outer

    def chat_format(self, **settings: Any) -> ChatFormat:
        """The chat format of this pair's tokenizer; see `ChatFormat` for the settings."""
        return ChatFormat(self.tokenizer, **settings)

    def identity(self, side: Side) -> Identity:
        """Which function a side is; computed once."""
        if side not in self._identities:
            with self.using(side) as model:
                self._identities[side] = identify(model, self.names[side])
        return self._identities[side]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self._models["base"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return dtype_of(self._models["base"])


def _side(source: Source, tokenizer: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """A transformers model and its tokenizer from any kind of source."""
    if isinstance(source, (str, Path)):
        model = load_causal_lm(source, **settings)
        return model, tokenizer or load_tokenizer(source, offline=settings["offline"])
    if is_hooked_model(source):
        raise LensError("one side is a hooked model and the other is not: give two hooked models, or none")
    if not isinstance(source, torch.nn.Module) or not hasattr(source, "get_output_embeddings"):
        raise LensError(
            f"got {type(source).__name__}, expected a path, a hub id or a transformers causal language model"
        )
    return source.eval(), _given_tokenizer(tokenizer, source)


def _given_tokenizer(tokenizer: Any, model: Any) -> Any:
    if tokenizer is None:
        raise LensError(f"{type(model).__name__} was given as an object: give its original tokenizer= too")
    return tokenizer


def _name(source: Source) -> str:
    if isinstance(source, (str, Path)):
        path = Path(source)
        return path.name if path.exists() else str(source)
    return getattr(source, "name_or_path", "") or type(source).__name__


def _require_same(what: str, base: Any, finetuned: Any) -> None:
    if base != finetuned:
        raise LensError(f"base and finetuned differ in {what}: {base} against {finetuned}")


def _check_tokenizers(base: Any, finetuned: Any) -> None:
    """Both sides must turn text into the same ids; say which part differs."""
    _require_same("vocabulary size", len(base), len(finetuned))
    theirs = finetuned.get_vocab()
    for token, index in base.get_vocab().items():
        if theirs.get(token) != index:
            raise LensError(
                f"base and finetuned differ in their vocabulary: {token!r} is {index} and {theirs.get(token)}"
            )
    _require_same("special tokens", base.special_tokens_map, finetuned.special_tokens_map)
    if base.chat_template != finetuned.chat_template:
        raise LensError("base and finetuned have different chat templates: see compare_templates, then pass tokenizer=")
