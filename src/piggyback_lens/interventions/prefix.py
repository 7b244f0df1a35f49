"""PrefixCache: every intervention on the prefix is, for all that follows, a set of keys and values.

Attention is causal, so the activations of the prefix do not depend on the query. Whatever is done there
(a patch of keys and values on some layers or heads, a residual patch, steering, ablation) reaches the
query and the answer only through the prefix's keys and values. Compile the intervention once, then run
any number of queries from the result and skip the prefix: a repaired answer costs less than a plain one.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import common_prefix_length, padded
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_bytes, read_json, write_json
from piggyback_lens.interventions.hooks import AnyIntervention, Intervention, Record, as_parts
from piggyback_lens.interventions.placement import Placement, Row
from piggyback_lens.interventions.running import applied
from piggyback_lens.models.backends import HookedModel, device_of, dtype_of, shape_of
from piggyback_lens.models.network import NOTHING, forward_keeping
from piggyback_lens.models.pair import Identity, ModelPair, identify
from piggyback_lens.models.states import KVState, filled_cache, generate_cache_name, state_from_keys_values
from piggyback_lens.words import Side

ROWS_PER_PASS = 64
"""Interventions that `compile_many` runs as rows of one pass."""
FORMAT = 2
"""Format 1, of 0.1.0, had prefixes alone; both are read."""
TemplateSpan = Literal["prefix", "postfix"]
"""Spans that the chat template writes, so that they have the same ids in every prompt."""


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """Keys and values of one prefix, or of the postfix of one prompt, which training holds others against.

    Attributes:
        ids: token ids of the span.
        keys: after a key norm, where there is one; `rotated` says whether after the rotary embedding too.
        values: as transformers caches them.
        description: the interventions under which it was compiled.
        fingerprint: of the chat template, its settings and the ids around the query.
        compiled_on: which model computed it.
        meant_for: models whose queries it may serve; empty if that was not recorded.
        settings: side, backend, dtype, the prefix as text, package versions.
        span: "prefix", or "postfix", which cannot be run from.
        rotated: keys as transformers caches them. Those of a postfix are not, since its place differs by prompt.

    Example:
        >>> prefix = PrefixCache.compile(pair, prompts[0], side="base")
        >>> with pair.using("finetuned") as model:
        ...     repaired = generate(model, prompts, prefix_cache=prefix, max_new_tokens=4)
        >>> len(repaired)
        3
    """

    ids: tuple[int, ...]
    keys: Float[Tensor, "layer kv_head pos d_head"]
    values: Float[Tensor, "layer kv_head pos d_head"]
    description: str = "no intervention"
    fingerprint: str = ""
    compiled_on: Identity | None = None
    meant_for: tuple[Identity, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    span: TemplateSpan = "prefix"
    rotated: bool = True

    def __post_init__(self) -> None:
        lengths = {len(self.ids), self.keys.shape[2], self.values.shape[2]}
        if len(lengths) > 1:
            raise LensError(
                f"a prefix of {len(self.ids)} tokens came with keys of {self.keys.shape[2]} and values of "
                f"{self.values.shape[2]}: the model did not keep "
                "what it computed (piggyback-lens doctor names the versions)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        on = f" on {self.compiled_on.name}" if self.compiled_on else ""
        return f"PrefixCache({len(self.ids)} tokens, {self.keys.shape[0]} layers, {self.description}{on})"

    @classmethod
    def compile(
        cls,
        model: HookedModel | ModelPair,
        prompt: RenderedPrompt,
        interventions: AnyIntervention = None,
        *,
        side: Side = "finetuned",
        record: Record | None = None,
    ) -> "PrefixCache":
        """Run the prefix once under interventions and keep its keys and values.

        Args:
            model: a hooked model, or a pair (then `side` says which one, and the identities are recorded).
            prompt: any prompt of the template settings; only its prefix is used.
            interventions: each must lie within the prefix.
            side: which model of a pair.
            record: collects receipts.

        Raises:
            LensError: an intervention that reaches beyond the prefix, or an empty prefix.
        """
        if isinstance(model, ModelPair):
            identity = model.identity(side)
            with model.using(side) as hooked:
                compiled = cls.compile(hooked, prompt, interventions, record=record)
            both = (model.identity("base"), model.identity("finetuned"))
            facts: dict[str, Any] = {
                "side": side,
                "backend": model.backend,
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            facts |= {"prefix_text": prompt.span_text("prefix"), "versions": versions()}
            return dataclasses.replace(compiled, compiled_on=identity, meant_for=both, settings=facts)
        parts = as_parts(interventions)
        require_prefix_only(parts, prompt)
        return _compile(model, prompt, [parts], len(prompt.span("prefix")), record)[0]

    @classmethod
    def compile_many(
        cls, model: HookedModel, prompt: RenderedPrompt, many: Sequence[AnyIntervention]
    ) -> list["PrefixCache"]:
        """One cache per entry of `many`, computed as rows of one batch: a layer sweep is one pass."""
        each = [as_parts(interventions) for interventions in many]
        for parts in each:
            require_prefix_only(parts, prompt)
        length = len(prompt.span("prefix"))
        chunks = [each[i : i + ROWS_PER_PASS] for i in range(0, len(each), ROWS_PER_PASS)]
        return [cache for chunk in chunks for cache in _compile(model, prompt, chunk, length, None)]

    def to(self, device: torch.device | str) -> "PrefixCache":
        """The same keys and values on another device."""
        return dataclasses.replace(self, keys=self.keys.to(device), values=self.values.to(device))

    def truncated(self, length: int) -> "PrefixCache":
        """The first `length` tokens (exact, since attention is causal)."""
        if not 0 < length <= len(self.ids):
            raise LensError(f"a prefix of {len(self.ids)} tokens cannot be cut to {length}")
        return dataclasses.replace(
            self, ids=self.ids[:length], keys=self.keys[:, :, :length], values=self.values[:, :, :length]
        )

    def check(self, model: HookedModel, prompts: Sequence[RenderedPrompt]) -> None:
        """Refuse a model or prompts that this cache was not made for.

        Raises:
            LensError: sizes differ, or a prompt's prefix has other ids; the message shows the first.
        """
        if self.span != "prefix" or not self.rotated:
            raise LensError(
                f"these are keys and values of a {self.span} (rotated: {self.rotated}), a pass starts from those of a "
                "rotated prefix: compile one with PrefixCache.compile"
            )
        shape = shape_of(model)
        wanted = (shape.n_layers, shape.n_kv_heads, shape.d_head)
        have = (self.keys.shape[0], self.keys.shape[1], self.keys.shape[3])
        if wanted != have:
            raise LensError(f"prefix cache has (layers, kv heads, d_head) {have}, the model {wanted}: compile it anew")
        for prompt in prompts:
            theirs = prompt.ids[: prompt.span("prefix").stop]
            if theirs != self.ids[: len(theirs)]:
                at = next(i for i, t in enumerate(theirs) if i >= len(self.ids) or t != self.ids[i])
                raise LensError(
                    f"the prompt's prefix differs from the cached one at token {at} ({prompt.pieces[at]!r}): "
                    "use the template settings of the cache, or compile it anew"
                )

    def state(self, model: HookedModel, batch_size: int) -> KVState:
        """The cache as keys and values of `batch_size` rows of a hooked model."""
        device, dtype = device_of(model), dtype_of(model)
        keys, values = (
            tensor.to(device, dtype)[:, None].expand(-1, batch_size, -1, -1, -1) for tensor in (self.keys, self.values)
        )
        return state_from_keys_values(model, keys, values)

    def to_hf_cache(
        self,
        batch_size: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """A DynamicCache of transformers, for past_key_values of a plain model's pass or of its generate.

        A new one is needed for every call, since transformers writes into it.
        """
        keys, values = (
            x.to(device=device, dtype=dtype)[:, None].repeat(1, batch_size, 1, 1, 1) for x in (self.keys, self.values)
        )
        return filled_cache(list(keys), list(values))

    def hf_inputs(
        self, prompts: Sequence[RenderedPrompt], *, device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """Keyword arguments for plain transformers: model.generate(**cache.hf_inputs(prompts)).

        Shorter prompts are padded between prefix and query, where the cache ends. With sliding windows
        shorter than the prompt that shifts distances: pass such models one prompt at a time.

        Raises:
            LensError: a prompt whose prefix is not the cached one.
        """
        length = len(self.ids)
        if any(prompt.ids[:length] != self.ids for prompt in prompts):
            raise LensError("a prompt does not begin with the cached prefix: use the template settings of the cache")
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            rest = len(prompt.ids) - length
            ids[row, :length] = torch.tensor(prompt.ids[:length])
            ids[row, width - rest :] = torch.tensor(prompt.ids[length:])
            mask[row, :length], mask[row, width - rest :] = 1, 1
        ids, mask = ids.to(device), mask.to(device)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            generate_cache_name(): self.to_hf_cache(len(prompts), device=device),
        }

    def save(self, folder: str | Path) -> Path:
        """Write prefix_cache.safetensors and prefix_cache.json into `folder`; atomic, the JSON last."""
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {"keys": self.keys.cpu().contiguous(), "values": self.values.cpu().contiguous()}
        facts = {
            "format": FORMAT,
            "ids": list(self.ids),
            "description": self.description,
            "fingerprint": self.fingerprint,
            "compiled_on": self.compiled_on.to_dict() if self.compiled_on else None,
            "meant_for": [identity.to_dict() for identity in self.meant_for],
            "settings": dict(self.settings),
            "span": self.span,
            "rotated": self.rotated,
            "shape": list(self.keys.shape),
        }
        blob = save(tensors)
        facts["sha256"] = hashlib.sha256(blob).hexdigest()
        atomic_write_bytes(folder / "prefix_cache.safetensors", blob)
        write_json(folder / "prefix_cache.json", facts)
        return folder

    @classmethod
    def load(
        cls, folder: str | Path, *, model: HookedModel | None = None, prompt: RenderedPrompt | None = None
    ) -> "PrefixCache":
        """Read a saved cache, and check it against the model and template settings it will be used with.

        Args:
            folder: as given to `save`.
            model: refuse the cache unless this is one of the models it is meant for.
            prompt: refuse the cache unless this prompt has its prefix.

        Raises:
            LensError: missing or damaged files, or a mismatch.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = Path(folder)
        if (folder / "kv_reference.json").exists() and not (folder / "prefix_cache.json").exists():
            return _load_reference_of_0_1(folder)
        facts = read_json(folder / "prefix_cache.json")
        file = folder / "prefix_cache.safetensors"
        if not file.is_file():
            raise LensError(f"{file} is missing: a prefix cache has it beside prefix_cache.json")
        try:
            blob = file.read_bytes()
            tensors = load(blob)
            keys, values, ids = tensors["keys"], tensors["values"], tuple(facts["ids"])
            texts = facts["description"], facts["fingerprint"]
            settings = facts["settings"]
            span, rotated = facts.get("span", "prefix"), facts.get("rotated", True)
            known = facts["format"] in (1, FORMAT) and span in get_args(TemplateSpan)
            found = (known, list(keys.shape), list(values.shape), hashlib.sha256(blob).hexdigest())
            stated = (True, facts["shape"], facts["shape"], facts["sha256"])
            identities = tuple(Identity.from_dict(data) for data in facts["meant_for"])
            on = Identity.from_dict(facts["compiled_on"]) if facts["compiled_on"] else None
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise LensError(f"{folder} holds no prefix cache that can be read ({error}): save it again") from error
        if found != stated or keys.shape[2] != len(ids):
            raise LensError(
                f"{folder}: the tensors are not those that its JSON (format {facts['format']}) describes: save it again"
            )
        cache = cls(ids, keys, values, *texts, on, identities, settings, span, bool(rotated))
        if model is not None:
            cache.check(model, [prompt] if prompt else [])
            theirs = identify(model)
            if identities and not any(identity.matches(theirs) for identity in identities):
                raise LensError(
                    f"{folder} is meant for {' or '.join(i.name for i in identities)}, and this model gives other "
                    "logits on the probe: compile a cache for it"
                )
        if prompt is not None and cache.fingerprint != prompt.fingerprint:
            raise LensError(f"{folder} was made with other template settings than this prompt: compile it anew")
        return cache


def _load_reference_of_0_1(folder: Path) -> PrefixCache:
    """What 0.1.0 kept of the base for training (kv_reference.json); its heads are joined to one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    facts = read_json(folder / "kv_reference.json")
    try:
        blob = (folder / "kv_reference.safetensors").read_bytes()
        if hashlib.sha256(blob).hexdigest() != facts["sha256"]:
            raise LensError(f"{folder} holds tensors that are not those its JSON describes; compute them again")
        tensors, span = load(blob), facts["span"]
        keys, values = (
            torch.stack([tensors[f"{name}.{i}"] for i in range(facts["layers"])])[:, None]
            for name in ("keys", "values")
        )
        ids = tuple(facts["ids"])
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise LensError(f"{folder} holds no keys and values that can be read ({error})") from error
    return PrefixCache(ids, keys, values, span=span, rotated=span == "prefix")


def require_prefix_only(parts: Sequence[Intervention], prompt: RenderedPrompt) -> None:
    """Refuse interventions that reach beyond the prefix.

    Raises:
        LensError: it names the intervention.
    """
    stop = prompt.span("prefix").stop
    row = Row.of(prompt)
    for part in parts:
        end = row.spans.get(part.span, (0, 0))[1]
        if end > stop or part.phase == "generation":
            raise LensError(f"{part} reaches beyond the prefix: only interventions within it compile to a PrefixCache")


def similar_batches(prompts: Sequence[RenderedPrompt], batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length together, and only rows with equally long prefixes, so that they share it."""
    by_prefix: dict[int, list[int]] = {}
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids)):
        by_prefix.setdefault(len(prompts[row].spans["prefix"]), []).append(row)
    for rows in by_prefix.values():
        yield from (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))


def starting_prefix(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    parts: Sequence[Intervention],
    prefix_cache: PrefixCache | None,
    record: Record,
    share: bool,
) -> PrefixCache | None:
    """The prefix to start from: the given one, or the common one computed under the interventions."""
    if prefix_cache is not None:
        length = len(prompts[0].spans["prefix"])
        _refuse_overlap(parts, prompts[0], length)
        return prefix_cache.truncated(length)
    length = common_prefix_length(prompts)
    if not share or not length or any(not _shareable(part, prompts[0], length) for part in parts):
        return None
    touching = [part for part in parts if _starts_before(part, prompts[0], length)]
    return _compile(model, prompts[0], [touching], length, record, must_touch=False)[0]


def _starts_before(part: Intervention, prompt: RenderedPrompt, length: int) -> bool:
    start, stop = Row.of(prompt).spans.get(part.span, (0, 0))
    return start < length and stop > start


def _shareable(part: Intervention, prompt: RenderedPrompt, length: int) -> bool:
    """Whether a part acts alike on the prefix of every row, so that one row may stand for all."""
    if not _starts_before(part, prompt, length):
        return True
    whole_span = part.tokens is None or Row.of(prompt).spans[part.span][1] <= length
    return part.action.one_row_stands_for_all(part) and part.rows is None and whole_span


def _refuse_overlap(parts: Sequence[Intervention], prompt: RenderedPrompt, length: int) -> None:
    for part in parts:
        if _starts_before(part, prompt, length) and part.phase != "generation":
            raise LensError(
                f"{part} acts on the prefix, which comes ready from the prefix cache: compile it into the cache, "
                "or choose a span after the prefix"
            )


def _compile(
    model: HookedModel,
    prompt: RenderedPrompt,
    each: Sequence[Sequence[Intervention]],
    length: int,
    record: Record | None,
    must_touch: bool = True,
) -> list[PrefixCache]:
    """Caches of the first `length` tokens under each set of interventions, one row of a batch for each."""
    count = len(each)
    batch = padded([prompt.ids[:length]] * count)
    placement = Placement.in_rows([Row.of(prompt)] * count, batch)
    parts: list[Intervention] = []
    for row, own in enumerate(each):
        # With one row the parts stay themselves, so that receipts continue in the passes that follow.
        parts += own if count == 1 else [dataclasses.replace(part, rows=(row,)) for part in own]
    with torch.no_grad(), applied(model, placement, parts, record=record, must_touch=must_touch):
        sides, device = forward_keeping(model, batch.ids, read=NOTHING)[1:], device_of(model)
    keys, values = (torch.stack([layer.to(device) for layer in side]) for side in sides)
    descriptions = [" + ".join(map(repr, own)) or "no intervention" for own in each]
    return [
        PrefixCache(prompt.ids[:length], keys[:, row], values[:, row], descriptions[row], prompt.fingerprint)
        for row in range(count)
    ]
