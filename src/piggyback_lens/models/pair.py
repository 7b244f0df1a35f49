"""Hooked models and the pair of base and finetuned.

`hook_model` turns a transformers model into a hooked one and proves that both give the same logits; `ModelPair`
holds the two sides of an experiment, with one copy of the weights where an adapter is all that differs.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, get_args

import torch

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import (
    HookedModel,
    Shape,
    backend_of,
    device_of,
    dtype_of,
    is_hooked_model,
    shape_of,
)
from piggyback_lens.models.booting import boot_bridge, build_hooked, share_equal_parameters
from piggyback_lens.models.gates import Gate, as_texts, base_spans, gate_of, set_gate, tokens_told
from piggyback_lens.models.network import forward
from piggyback_lens.models.peft_adapters import (
    adapter_config,
    adapter_folder,
    adapter_shapes,
    made_for_another_base,
    put_adapter,
    read_gate,
    refuse_adapters_beyond_weights,
    refuse_lost_base,
    written_when_attached,
)
from piggyback_lens.models.places import is_adapter_folder
from piggyback_lens.models.plain_views import remember_plain
from piggyback_lens.models.proof import Expected, prove, prove_gate
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer, source_name
from piggyback_lens.models.versions import Version, version_of
from piggyback_lens.models.views import (
    gradients_kept,
    inner_model,
    is_peft_model,
    require_current,
    structural_copy,
    text_part,
    watch,
    weights_version,
    without_adapters,
)
from piggyback_lens.progress import counting, shows
from piggyback_lens.settings import ChatSettings, LoadSettings
from piggyback_lens.words import SIDES, Backend, Side

Source = Any
"""A hub id, a local folder, a GGUF file, a PEFT adapter folder, a transformers model, or a hooked model."""


@shows("loading")
def hook_model(
    hf_model: Any,
    tokenizer: Any,
    *,
    backend: Backend = "bridge",
    name: str | None = None,
    progress: bool | str = True,
) -> HookedModel:
    """Make a hooked model of a transformers causal language model, and prove that it is the same function.

    Args:
        hf_model: the model, or a PEFT model (with its active adapter). It is left as it is: the bridge is made of a
            copy of its modules that shares the weights and is in evaluation mode; a HookedTransformer copies them.
        tokenizer: kept as it is, for the hooked model's own convenience functions.
        backend: "bridge" (TransformerBridge) or "hooked" (HookedTransformer, transformer-lens 3.9 only).
        name: shown in messages.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: the architecture or the adapter is unsupported, or the logits differ; the message has the figures.
    """
    shown = name or getattr(hf_model, "name_or_path", "") or type(hf_model).__name__
    refuse_adapters_beyond_weights(hf_model)
    return _hooked(hf_model, tokenizer, backend, Expected.of(structural_copy(hf_model).eval(), shown))


def _hooked(owner: Any, tokenizer: Any, backend: Backend, expected: Expected) -> HookedModel:
    """The hooked model of an owner's model, proven to compute what is expected."""
    if backend not in get_args(Backend):
        raise LensError(f"backend {backend!r} is not known: choose 'bridge' or 'hooked'")
    with counting(None, f"hooking and checking {expected.name}"):
        boot = boot_bridge if backend == "bridge" else build_hooked
        model = boot(owner, tokenizer, expected.name)
        prove(model, expected)
    if backend == "bridge":
        beside = structural_copy(owner).eval()
        text = text_part(inner_model(beside))
        remember_plain(model, beside if text is inner_model(beside) else text)
    return model


@dataclass(frozen=True)
class Identity:
    """Says which function a model is: its sizes, its logits on fixed tokens, and where its adapter is off.

    Logits rather than a hash of weights, because the same model has differently named and folded
    weights as transformers model, bridge, merged adapter and HookedTransformer.
    """

    name: str
    shape: Shape
    probe: tuple[float, ...]
    off: tuple[str, ...] = ()

    def matches(self, other: "Identity", tolerance: float = 2e-3) -> bool:
        """Same sizes, and probe logits equal to `tolerance` of the largest; the adapter off at the same tokens.

        Logits of bfloat16 may be one of its steps apart, as they are on another kind of GPU.
        """
        if self.shape != other.shape or self.off != other.off or len(self.probe) != len(other.probe):
            return False
        both = torch.tensor(self.probe + other.probe)
        if torch.allclose(both, both.bfloat16().float(), rtol=0, atol=1e-5):  # which are kept to five digits
            tolerance = max(tolerance, torch.finfo(torch.bfloat16).eps)
        scale = max(map(abs, self.probe + other.probe))
        return all(abs(a - b) <= tolerance * scale for a, b in zip(self.probe, other.probe, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"name": self.name, "shape": asdict(self.shape), "probe": list(self.probe)}
        return found | ({"off": list(self.off)} if self.off else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Identity":
        """Inverse of `to_dict`."""
        return cls(data["name"], Shape(**data["shape"]), tuple(data["probe"]), tuple(data.get("off", ())))


def identify(model: HookedModel, name: str = "") -> Identity:
    """The identity of a hooked model in its present state (adapter on or off), by default under its own name."""
    shape, name = shape_of(model), name or PurePath(str(model.cfg.model_name)).name
    ids = ((torch.arange(12) * 9973 + 11) % shape.d_vocab).to(device_of(model))[None]
    wanted = torch.linspace(0, shape.d_vocab - 1, 48).long()
    with torch.no_grad(), tokens_told(model):  # of no conversation: the adapter is on
        last = torch.tensor([[ids.shape[1] - 1]], device=ids.device)
        logits = forward(model, ids, torch.ones_like(ids), read=last)[0, 0]
    probe = tuple(round(x, 5) for x in logits[wanted.to(logits.device)].float().tolist())
    return Identity(name, shape, probe, as_texts(gate_of(model)))


class ModelPair:
    """A base model and a narrow finetune of it, as hooked models.

    Use `with pair.using("base") as model:` (or `"finetuned"`); inside, it is an ordinary TransformerLens model.
    Where the two differ by an adapter, they share the weights that it left alone.

    Example:
        >>> with pair.using("base") as model:
        ...     answers = generate(model, prompts, max_new_tokens=4)
        >>> len(answers) == len(prompts)
        True
    """

    def __init__(
        self,
        base: HookedModel,
        finetuned: HookedModel,
        *,
        tokenizer: Any,
        names: tuple[str, str] = ("base", "finetuned"),
        notes: tuple[str, ...] = (),
    ) -> None:
        """Make a pair of hooked models that you built; `ModelPair.load` builds them for you.

        Args:
            base: either backend.
            finetuned: the other side, of the same backend.
            tokenizer: the original tokenizer, with its chat template.
            names: for figures and results.
            notes: what a reader of results should know of how the sides were loaded.

        Raises:
            LensError: sizes or backends differ, a model whose weights TransformerLens has processed (folded or
                centred), or a tokenizer with more ids than the models.
        """
        self._models: dict[Side, HookedModel] = {"base": base, "finetuned": finetuned}
        self.tokenizer = tokenizer
        self.names: dict[Side, str] = {"base": names[0], "finetuned": names[1]}
        self.notes = notes
        self.backend: Backend = backend_of(base)
        self.shape = shape_of(base)
        _require_same_sizes(self.shape, shape_of(finetuned))
        _require_same("backend", self.backend, backend_of(finetuned))
        for side, model in self._models.items():
            _refuse_processed(model, side)
        _require_room(tokenizer, self.shape.d_vocab)
        self._identities: dict[Side, tuple[Version, Identity]] = {}
        self._recipe: dict[str, Any] | None = None
        self._versions = {side: version_of(model) for side, model in self._models.items()}

    def __repr__(self) -> str:
        """One line: names, backend, sizes."""
        return (
            f"ModelPair({self.names['base']!r}, {self.names['finetuned']!r}, backend={self.backend!r}, "
            f"{self.shape.n_layers} layers, {self.device}, {self.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the names of what was loaded: another process loads it, and checks that it is the same.

        Raises:
            LensError: a side was given as an object, or its weights were changed after it was loaded.
        """
        if self._recipe is None:
            raise LensError(
                "this pair was made of models in memory, which another process cannot load: save them, and use "
                "ModelPair.load with the names of their folders"
            )
        changed = [side for side, model in self._models.items() if version_of(model) != self._versions[side]]
        if changed:
            raise LensError(
                f"the weights of {' and '.join(changed)} were changed after they were loaded, and another process "
                "loads them as they are on the disk: save them, and load the pair from there"
            )
        return _from_names, (pickle.dumps((self._recipe, self.identities())),)

    @classmethod
    @shows("loading")
    def load(  # noqa: PLR0913
        cls,
        base: Source = None,
        finetuned: Source = None,
        adapter: str | Path | None = None,
        *,
        backend: Backend = "bridge",
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        quantization: Any = None,
        trust_remote_code: bool = False,
        offline: bool = False,
        device_map: Any = None,
        names: tuple[str, str] | None = None,
        progress: bool | str = True,
    ) -> "ModelPair":
        """Load both sides, hook them, and prove that each computes what its owner computes.

        The base is compared with the plain model (before an adapter is attached, or with it switched off), the
        finetuned side with transformers' or PEFT's own pass. Models that are given as objects are left as they are.
        An adapter that `GatedAdapter` saved is off where it was off while it was trained, in every pass; that is
        compared with PEFT's own layers, switched by hand token by token.

        Args:
            base: hub id ("owner/name", or "owner/name@revision:folder"), local folder, GGUF file, transformers model or
                hooked model; None for the demo model.
            finetuned: a whole model of the same kinds, a PEFT adapter folder, or a PeftModel with its active adapter
                (whose base model is then the base side, unless `base` gives another).
            adapter: a PEFT adapter folder, or the hub id of one ("owner/name@main:checkpoint-120"); the base given
                here is used, whatever base the adapter names (the pair's notes say so where it is another).
            backend: "bridge" or "hooked". The bridge keeps one copy of the weights; "hooked" copies them, and shares
                between its two models the parameters which the adapter left alone.
            tokenizer: needed with models that are given as objects.
            device: default cuda if there is one, else cpu.
            dtype: of the weights that are loaded: "float32", "bfloat16", "float16", "auto" for the one they are stored
                in, or a torch.dtype; objects keep theirs.
            attn_implementation: transformers' attention ("eager", "sdpa", ...) of what is loaded.
            quantization: "4bit", "8bit" or a quantisation config of transformers, for what is loaded.
            trust_remote_code: run code that a repository brings; it can do whatever you can.
            offline: make no connection at all.
            device_map: spread the layers of what is loaded over devices: "auto", "balanced", "sequential", or a mapping
                of modules to devices or "disk"; of the bridge only, and instead of `device`.
            names: of base and finetuned, for figures and results; default from the sources.
            progress: show a line with the time left; a text is its label.

        Raises:
            LensError: anything that is not loadable or does not fit, in one line.
        """
        gate: Gate = ()
        if finetuned is None and adapter is None and is_peft_model(base):
            raise LensError("a PEFT model holds both sides: ModelPair.load(finetuned=peft_model, tokenizer=tokenizer)")
        if (finetuned is None) == (adapter is None):
            raise LensError("give exactly one of finetuned= and adapter=")
        if is_adapter_folder(finetuned):
            finetuned, adapter = None, finetuned
        if is_hooked_model(base) and is_hooked_model(finetuned):
            return cls(base, finetuned, tokenizer=_given_tokenizer(tokenizer, base), names=names or SIDES)
        options = LoadSettings(
            device=device,
            dtype=dtype,
            offline=offline,
            attn_implementation=attn_implementation,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
        )
        recipe = {name: _lasting(x) for name, x in (("base", base), ("finetuned", finetuned), ("adapter", adapter))}
        if is_peft_model(finetuned) and base is None:
            return cls._from_peft(
                finetuned, _given_tokenizer(tokenizer, finetuned), backend, names or ("base", "adapter")
            )
        if base is None:
            base = default_model(offline=offline)
        hf_base, base_tokenizer = _side(base, tokenizer, options)
        names = names or (_name(base), _name(finetuned if adapter is None else adapter))
        expected = Expected.of(structural_copy(hf_base).eval(), names[0])  # before an adapter is attached
        if adapter is not None:
            folder = adapter_folder(adapter, offline=offline)
            # Attaching may write into the base (trained biases, PiSSA): the copy has what is written for itself.
            config, gate = adapter_config(folder), read_gate(folder)
            if gate and backend != "bridge":
                raise LensError(
                    f"adapter {folder} was trained with itself off at some tokens, and backend {backend!r} merges it "
                    "into the weights: use backend='bridge'"
                )
            apart = structural_copy(hf_base, own=written_when_attached(config))
            whole = any("language_model" in name for name in adapter_shapes(folder, config))  # of a multimodal model
            with gradients_kept(hf_base):  # PEFT freezes what it is put on
                tuned = put_adapter(apart if whole else text_part(apart), folder)
            notes = made_for_another_base(tuned, hf_base)
        else:
            tuned, tuned_tokenizer = _side(finetuned, tokenizer, options)
            notes = _check_tokenizers(base_tokenizer, tuned_tokenizer)
        refuse_adapters_beyond_weights(tuned)
        hooked_base = _hooked(hf_base, base_tokenizer, backend, expected)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        pair = cls._with_finetuned(hooked_base, tuned, base_tokenizer, backend, names, notes, gate)
        if all(source is None or isinstance(source, str) for source in recipe.values()):
            pair._recipe = {**recipe, **vars(options), "backend": backend, "tokenizer": tokenizer, "names": names}
        return pair

    @classmethod
    def _from_peft(cls, peft_model: Any, tokenizer: Any, backend: Backend, names: tuple[str, str]) -> "ModelPair":
        """Both sides of a PEFT model."""
        refuse_adapters_beyond_weights(peft_model)
        refuse_lost_base(peft_model)
        expected = Expected.of(structural_copy(peft_model).eval(), names[0], adapter=False)
        base = _hooked(without_adapters(peft_model), tokenizer, backend, expected)
        watch(base, peft_model, shares=backend == "bridge")
        return cls._with_finetuned(base, peft_model, tokenizer, backend, names)

    @classmethod
    def _with_finetuned(
        cls,
        base: HookedModel,
        tuned: Any,
        tokenizer: Any,
        backend: Backend,
        names: tuple[str, str],
        notes: tuple[str, ...] = (),
        gate: Gate = (),
    ) -> "ModelPair":
        """The pair of a hooked base and a transformers or PEFT model."""
        expected = Expected.of(structural_copy(tuned).eval(), names[1])
        hooked = _hooked(tuned, tokenizer, backend, expected)
        if gate:
            prove_gate(hooked, expected, gate, base)
            set_gate(hooked, gate)
        if backend == "hooked":
            share_equal_parameters(hooked, base)
        return cls(base, hooked, tokenizer=tokenizer, names=names, notes=notes)

    @contextmanager
    def using(self, side: Side) -> Iterator[HookedModel]:
        """The hooked model of one side, for the length of the block.

        Raises:
            LensError: unknown side, or the model was changed after it was paired in a way that its hooked view does
                not see (another active adapter, a merge, another dtype, new embeddings).
        """
        if side not in SIDES:
            raise LensError(f"side {side!r} is not known: choose 'base' or 'finetuned'")
        require_current(self._models[side])
        yield self._models[side]

    def chat_format(self, settings: ChatSettings = ChatSettings()) -> ChatFormat:
        """The chat format of this pair's tokenizer."""
        return ChatFormat(self.tokenizer, **vars(settings))

    def identity(self, side: Side) -> Identity:
        """Which function a side is; computed once, and again after its weights were trained."""
        version = weights_version(self._models[side])
        if side not in self._identities or self._identities[side][0] != version:
            with self.using(side) as model:
                self._identities[side] = version, identify(model, self.names[side])
        return self._identities[side][1]

    def identities(self) -> dict[str, Identity]:
        """The identities of both sides, by the name of the side."""
        return {side: self.identity(side) for side in SIDES}

    @property
    def base_spans(self) -> tuple[str, ...]:
        """Spans whose keys and values are the base's on both sides, since the adapter is off there and before."""
        return base_spans(gate_of(self._models["finetuned"]))

    @property
    def device(self) -> torch.device:
        """The device that token ids are sent to."""
        return device_of(self._models["base"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights of the base model."""
        return dtype_of(self._models["base"])


@lru_cache(maxsize=1)
def _from_names(blob: bytes) -> ModelPair:
    """The pair of `ModelPair.__reduce__`, loaded once in this process."""
    recipe, identities = pickle.loads(blob)  # noqa: S301  # of this program's own
    pair = ModelPair.load(**recipe, progress=False)
    for side, identity in identities.items():
        if not pair.identity(side).matches(identity):
            raise LensError(f"{side} ({identity.name}) gives other logits here than in the process that sent it")
    return pair


def _lasting(source: Source) -> Source:
    """A source as a process in another folder finds it."""
    if not isinstance(source, str | Path):
        return source
    return str(Path(source).absolute()) if Path(source).exists() else str(source)


def _side(source: Source, tokenizer: Any, options: LoadSettings) -> tuple[Any, Any]:
    """A transformers model and its tokenizer from any kind of source."""
    if isinstance(source, (str, Path)):
        model = load_causal_lm(source, options)
        return model, tokenizer or load_tokenizer(source, options)
    if is_hooked_model(source):
        raise LensError("one side is a hooked model and the other is not: give two hooked models, or none")
    if not isinstance(source, torch.nn.Module) or not hasattr(source, "get_output_embeddings"):
        raise LensError(
            f"got {type(source).__name__}, expected a path, a hub id or a transformers causal language model"
        )
    return source, _given_tokenizer(tokenizer, source)


def _given_tokenizer(tokenizer: Any, model: Any) -> Any:
    if tokenizer is None:
        raise LensError(f"{type(model).__name__} was given as an object: give its original tokenizer= too")
    return tokenizer


def _name(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return source_name(source)
    return getattr(source, "name_or_path", "") or type(source).__name__


def _require_same(what: str, base: Any, finetuned: Any) -> None:
    if base != finetuned:
        raise LensError(f"base and finetuned differ in {what}: {base} against {finetuned}")


def _require_same_sizes(base: Shape, finetuned: Shape) -> None:
    theirs = asdict(finetuned)
    differ = [f"{name} {value} against {theirs[name]}" for name, value in asdict(base).items() if value != theirs[name]]
    if differ:
        raise LensError(f"base and finetuned differ in sizes: {', '.join(differ)}")


def _require_room(tokenizer: Any, d_vocab: int) -> None:
    """Every id of the tokenizer must have a row in the embeddings."""
    if tokenizer is not None and (most := max(tokenizer.get_vocab().values())) >= d_vocab:
        raise LensError(
            f"the tokenizer has ids up to {most} and the model {d_vocab} embeddings (resized or trimmed?): give the "
            "tokenizer that the model was saved with"
        )


def _refuse_processed(model: Any, side: Side) -> None:
    """Folded and centred weights give activations another meaning at most sites."""
    normalization = str(getattr(model.cfg, "normalization_type", ""))
    if normalization.endswith("Pre"):
        raise LensError(
            f"the {side} model's weights were processed by TransformerLens (normalization_type {normalization}: layer "
            "norms folded in), so hooks mean something else there: load it with from_pretrained_no_processing"
        )


def _check_tokenizers(base: Any, finetuned: Any) -> tuple[str, ...]:
    """Both sides must turn text into the same ids. Returns notes of what differs and does not matter."""
    _require_same("vocabulary size", len(base), len(finetuned))
    theirs = finetuned.get_vocab()
    for token, index in base.get_vocab().items():
        if theirs.get(token) != index:
            raise LensError(
                f"base and finetuned differ in their vocabulary: {token!r} is {index} and {theirs.get(token)}"
            )
    special = [{k: v for k, v in t.special_tokens_map.items() if k != "pad_token"} for t in (base, finetuned)]
    _require_same("special tokens", *special)
    if base.chat_template != finetuned.chat_template:
        raise LensError("base and finetuned have different chat templates: see compare_templates, then pass tokenizer=")
    if base.pad_token == finetuned.pad_token:
        return ()
    return (f"base pads with {base.pad_token!r} and finetuned with {finetuned.pad_token!r}: padding is masked here",)
