"""Patching experiments the slow way: plain transformers, forward hooks of torch, one conversation at a time.

Nothing is padded, cached, batched or shared, and nothing of the library's hooks or of TransformerLens is used;
of the library only rendered prompts are read (their ids and spans).

What the sites mean, layer by layer, for every layout of `tiny_models`:

* resid_pre, resid_post: input and output of the layer.
* attn_out, mlp_out: what attention and MLP add to the residual stream. In Gemma 3 that is the output of the norm
  behind each of them (post_attention_layernorm, post_feedforward_layernorm), not of the block itself.
* resid_mid: resid_pre + attn_out.
* q, k, v: outputs of the projections, [pos, head, d_head], before key norm and rotary embedding.
* rot_k: keys where attention uses them. Rotation at a given position is a bijection, so a patch at the same
  position is a patch of the key that enters it: the output of the key norm, or else of the projection.
* z: input of the output projection, [pos, head, d_head].
* mlp_post: input of the MLP's second matrix.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

DONOR = {"repair": "base", "infect": "finetuned"}
RECIPIENT = {"repair": "finetuned", "infect": "base"}

Edit = Callable[[str, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Overwrite:
    """These positions (and heads) of a site become `values`, one row per position."""

    site: str
    layer: int
    positions: Sequence[int]
    values: torch.Tensor
    heads: Sequence[int] | None = None

    def into(self, activation: torch.Tensor) -> torch.Tensor:
        changed = activation.clone()
        for position, value in zip(self.positions, self.values, strict=True):
            if self.heads is None:
                changed[position] = value
            else:
                for head in self.heads:
                    changed[position, head] = value[head]
        return changed


def _layers(model: Any) -> list[Any]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _as(output: Any, value: torch.Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@contextmanager
def editing(model: Any, edit: Edit, layers: Collection[int] | None = None) -> Iterator[None]:
    """`edit(site, layer, [pos, ...feature])` sees every activation of one row, and gives what is to stand there."""
    handles = []
    for number, layer in enumerate(_layers(model)):
        if layers is None or number in layers:
            handles += _edit_layer(model, layer, number, edit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edit_layer(model: Any, layer: Any, number: int, edit: Edit) -> list[Any]:
    config, stream = model.config, {}
    sandwich = hasattr(layer, "post_feedforward_layernorm")
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads

    def before(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return module.register_forward_pre_hook(lambda _, args: (change(args[0][0])[None], *args[1:]))

    def after(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return module.register_forward_hook(lambda _, __, out: _as(out, change(_first(out)[0])[None]))

    def by_head(site: str, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: edit(site, number, x.view(len(x), count, d_head)).reshape(x.shape)

    def resid_pre(x: torch.Tensor) -> torch.Tensor:
        stream["pre"] = edit("resid_pre", number, x)
        return stream["pre"]

    def attention_added(x: torch.Tensor) -> torch.Tensor:
        added = edit("attn_out", number, x)
        middle = stream["pre"] + added
        wanted = edit("resid_mid", number, middle)
        return added if torch.equal(wanted, middle) else wanted - stream["pre"]

    def mlp_added(x: torch.Tensor) -> torch.Tensor:
        return edit("mlp_out", number, x)

    def resid_post(x: torch.Tensor) -> torch.Tensor:
        return edit("resid_post", number, x)

    def normed(x: torch.Tensor) -> torch.Tensor:  # Gemma 3 has the heads in front, Qwen3 the positions
        return edit("rot_k", number, x.transpose(0, 1)).transpose(0, 1) if sandwich else edit("rot_k", number, x)

    ends = [before(layer, resid_pre), after(layer, resid_post)]
    if hasattr(layer, "attn"):  # gpt2

        def qkv(x: torch.Tensor) -> torch.Tensor:
            parts = zip("qkv", x.split(heads * d_head, dim=-1), strict=True)
            return torch.cat([by_head(site, heads)(part) for site, part in parts], dim=-1)

        return [
            *ends,
            after(layer.attn.c_attn, qkv),
            before(layer.attn.c_proj, by_head("z", heads)),
            after(layer.attn, attention_added),
            before(layer.mlp.c_proj, lambda x: edit("mlp_post", number, x)),
            after(layer.mlp, mlp_added),
        ]
    attention = layer.self_attn
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    handles = [after(getattr(attention, f"{site}_proj"), by_head(site, count)) for site, count in counts.items()]
    if hasattr(attention, "k_norm"):
        handles.append(after(attention.k_norm, normed))
    else:  # after the hook of k, so that both act
        handles.append(after(attention.k_proj, by_head("rot_k", kv_heads)))
    return [
        *ends,
        *handles,
        before(attention.o_proj, by_head("z", heads)),
        after(layer.post_attention_layernorm if sandwich else attention, attention_added),
        before(layer.mlp.down_proj, lambda x: edit("mlp_post", number, x)),
        after(layer.post_feedforward_layernorm if sandwich else layer.mlp, mlp_added),
    ]


@torch.no_grad()
def read(model: Any, ids: Sequence[int]) -> dict[tuple[str, int], torch.Tensor]:
    """Every activation of one conversation: (site, layer) to [pos, ...feature]."""
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        kept[site, layer] = value.clone()
        return value

    with editing(model, keep):
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return kept


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], overwrites: Sequence[Overwrite] = ()) -> torch.Tensor:
    """[pos, vocab] of one conversation while some activations are overwritten, in order."""
    used = []

    def overwrite(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        for one in overwrites:
            if (one.site, one.layer) == (site, layer):
                value = one.into(value)
                used.append(one)
        return value

    with editing(model, overwrite, {one.layer for one in overwrites}):
        found = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    assert len(used) == len(overwrites)
    return found


def mean_log_prob(model: Any, ids: Sequence[int], n_prompt: int, overwrites: Sequence[Overwrite] = ()) -> float:
    """Mean over the answer's tokens of log p, from the softmax of the full logits, in float64."""
    rows = logits(model, ids, overwrites).double()
    total = 0.0
    for position in range(n_prompt, len(ids)):
        row = rows[position - 1]
        total += float(row[ids[position]] - row.max() - (row - row.max()).exp().sum().log())
    return total / (len(ids) - n_prompt)


@dataclass
class SlowLab:
    """Two transformers models and a contrast of two answers per prompt.

    Attributes:
        models: base and finetuned.
        towards: per prompt ids of the prompt followed by one answer.
        against: the same with the other answer.
        prompts: rendered, without a response.
        empty: the template without a query, donor of postfix activations if it is given.
    """

    models: Mapping[str, Any]
    prompts: Sequence[Any]
    towards: Sequence[Sequence[int]]
    against: Sequence[Sequence[int]]
    empty: Any = None
    kept: dict[tuple[str, tuple[int, ...]], Any] = field(default_factory=dict)
    known: dict[str, list[float]] = field(default_factory=dict)

    def activations(self, side: str, ids: Sequence[int]) -> dict[tuple[str, int], torch.Tensor]:
        key = (side, tuple(ids))
        if key not in self.kept:
            self.kept[key] = read(self.models[side], ids)
        return self.kept[key]

    def contrasts(self, side: str, overwrites: Sequence[Sequence[Overwrite]] | None = None) -> list[float]:
        """Per prompt, one side with its own overwrites: log p of towards - log p of against."""
        model, found = self.models[side], []
        for i, prompt in enumerate(self.prompts):
            n, own = len(prompt.ids), overwrites[i] if overwrites else ()
            plus, minus = (mean_log_prob(model, ids[i], n, own) for ids in (self.towards, self.against))
            found.append(plus - minus)
        return found

    def cell(self, labels: Mapping[str, Any]) -> list[float]:
        """The measure per prompt of a cell with these labels: flow, series, span, sites, layers, heads, tokens.

        Spans may be several ("prefix + postfix"), sites too ("k+v"). With `other_tokens` (span to indices) these
        are patched instead of the span.
        """
        key = repr(sorted((name, labels.get(name)) for name in NAMED))
        if key not in self.known:
            side = RECIPIENT[labels["flow"]]
            self.known[key] = self.contrasts(side, [self.overwrites(labels, prompt) for prompt in self.prompts])
        return self.known[key]

    def overwrites(self, labels: Mapping[str, Any], prompt: Any) -> list[Overwrite]:
        source = RECIPIENT if labels["series"] == "identity control" else DONOR
        side, found = source[labels["flow"]], []
        chosen = labels.get("other_tokens") or dict.fromkeys(labels["span"].split(" + "), labels["tokens"])
        for name, tokens in chosen.items():
            donor = self.empty if self.empty is not None and name == "postfix" else prompt
            own, theirs = (_picked(x, name, tokens) for x in (prompt, donor))
            values = self.activations(side, donor.ids)
            for site in labels["sites"].split("+"):
                for layer in labels["layers"]:
                    found.append(Overwrite(site, layer, own, values[site, layer][theirs], labels["heads"]))
        return found


NAMED = ("flow", "series", "span", "sites", "layers", "heads", "tokens", "other_tokens")


def _picked(prompt: Any, name: str, tokens: Sequence[int] | None) -> list[int]:
    """Positions of a span, or of some tokens of it."""
    start, stop = (0, len(prompt.ids)) if name == "prompt" else (prompt.spans[name].start, prompt.spans[name].stop)
    whole = list(range(start, stop))
    return whole if tokens is None else [whole[token] for token in tokens]
