"""Patching experiments between base and finetuned.

The direction of a patch is always donor to recipient: *repair* is base to finetuned, *infect* finetuned to
base. A prefix patch is compiled to a `PrefixCache`; query and postfix patches are interventions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.activations import Activations
from piggyback_lens.backends import Site, check_layers, forward
from piggyback_lens.chat import ChatFormat, RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.hooks import Interventions, cache, patch
from piggyback_lens.maths import Estimate, norm_matched_random, recovery
from piggyback_lens.models import ModelPair, Side
from piggyback_lens.placement import Placement, Row
from piggyback_lens.prefix import PrefixCache
from piggyback_lens.progress import track
from piggyback_lens.running import Record, applied
from piggyback_lens.scoring import contrast

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Direction = Literal["repair", "infect"]
DONOR: dict[Direction, Side] = {"repair": "base", "infect": "finetuned"}
RECIPIENT: dict[Direction, Side] = {"repair": "finetuned", "infect": "base"}


def prefix_activations(
    pair: ModelPair,
    side: Side,
    prompt: RenderedPrompt,
    sites: Site | Sequence[Site],
    layers: Sequence[int] | None = None,
) -> Activations:
    """Activations of the prefix on one side, one row; they hold for every query of the same settings."""
    length = len(prompt.span("prefix"))
    ids = torch.tensor([prompt.ids[:length]], device=pair.device)
    positions = torch.arange(length)[None]
    placement = Placement((Row.of_prefix(prompt, length),), positions, positions)
    keep = cache(sites, span="prefix", layers=layers, device=None)
    read = torch.zeros((1, 1), dtype=torch.long, device=ids.device)
    with torch.no_grad(), pair.using(side) as model, applied(model, placement, keep) as record:
        forward(model, ids, torch.ones_like(ids), read=read)
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
            batch = batch_prompts([prompts[row] for row in rows], side="right", device=pair.device)
            placement = Placement.of(batch, tuple(rows), len(prompts))
            with applied(model, placement, keep, record=record):
                last = torch.zeros((len(rows), 1), dtype=torch.long, device=pair.device)
                forward(model, batch.ids, batch.attention_mask, read=last)
    return record.activations_of(span)


def kv_patch(
    pair: ModelPair,
    span: str,
    *,
    chat: ChatFormat,
    prompts: Sequence[RenderedPrompt] | None = None,
    direction: Direction = "repair",
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
        direction: "repair" (base to finetuned) or "infect".
        layers: None for all.

    Raises:
        LensError: the span is empty for this template, or prompts are missing.
    """
    donor_side = DONOR[_direction(direction)]
    if span in ("prefix", "postfix"):
        empty = chat.empty_query()
        empty.span(span)
        return patch(span_activations(pair, donor_side, [empty], span, ("k", "v"), layers=layers))
    if not prompts:
        raise LensError(f"a patch of span {span!r} takes each prompt's own donor: give prompts=")
    return patch(span_activations(pair, donor_side, prompts, span, ("k", "v"), layers=layers))


def _direction(direction: Direction) -> Direction:
    if direction not in DONOR:
        raise LensError(f"direction {direction!r} is not known: choose 'repair' or 'infect'")
    return direction


# ---------------------------------------------------------------- layer curve


@dataclass(frozen=True)
class LayerCurve:
    """Recovery of a teacher-forced contrast when one layer's prefix activations are patched.

    Attributes:
        layers: which layers.
        contrasts: series name to contrast per (layer, prompt), in nats per token.
        recipient: contrast of the unpatched recipient per prompt.
        donor: contrast of the donor per prompt.
        whole: contrast with the donor's whole prefix (keys and values of all layers) per prompt.
        site: which activation was patched.
        direction: repair or infect.
        settings: names, n, seeds, template hash.
    """

    layers: tuple[int, ...]
    contrasts: dict[str, list[list[float]]]
    recipient: list[float]
    donor: list[float]
    whole: list[float]
    site: str
    direction: str
    settings: dict[str, Any] = field(default_factory=dict)

    def estimate(self, series: str, layer: int) -> Estimate:
        """Recovery at one layer with its interval over prompts."""
        row = self.contrasts[series][self.layers.index(layer)]
        return recovery(row, self.recipient, self.donor)

    def to_frame(self) -> "pd.DataFrame":
        """Columns layer, series, value (recovery), low, high, n, reason."""
        import pandas as pd

        rows = []
        for series, values in self.contrasts.items():
            for layer, row in zip(self.layers, values, strict=True):
                if np.isnan(row).all():
                    continue  # a control that was run at some layers only
                found = recovery(row, self.recipient, self.donor)
                facts = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
                rows.append({"layer": layer, "series": series, **facts, "reason": found.reason})
        return pd.DataFrame(rows)

    @property
    def noise_floor(self) -> float:
        """Largest |recovery| of the identity control: what numerical noise alone does."""
        gap = float(np.mean(self.donor) - np.mean(self.recipient))
        run = np.array([row for row in self.contrasts["identity control"] if not np.isnan(row).all()])
        if not gap or not run.size:
            return float("nan")
        return float(np.abs((run.mean(axis=1) - np.mean(self.recipient)) / gap).max())

    def figure(self) -> "go.Figure":
        """Recovery against the layer, with controls, interval bands and the noise floor."""
        from piggyback_lens.plots import layer_curve_figure

        names = self.settings.get("names", {})
        labels = {0.0: f"0 = {RECIPIENT[self.direction]}", 1.0: f"1 = {DONOR[self.direction]}"}  # type: ignore[index]
        whole = recovery(self.whole, self.recipient, self.donor)
        if not np.isnan(whole.value):
            labels[whole.value] = f"{whole.value:.2f} = all layers' K/V"
        title = f"{self.direction}: prefix {self.site} of one layer, {names.get('base', 'base')} and its finetune"
        frame = self.to_frame()
        return layer_curve_figure(
            frame[frame["series"] != "identity control"],
            title=title,
            y_label="recovery of the answer contrast",
            references=labels,
            noise_floor=None if np.isnan(self.noise_floor) else self.noise_floor,
        )

    def save(self, path: str | Path) -> Path:
        """Write as JSON."""
        return write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "LayerCurve":
        """Read what `save` wrote."""
        data = read_json(path)
        try:
            contrasts = {name: [_numbers(row) for row in rows] for name, rows in data["contrasts"].items()}
            unpatched = {name: _numbers(data[name]) for name in ("recipient", "donor", "whole")}
            return cls(**{**data, **unpatched, "layers": tuple(data["layers"]), "contrasts": contrasts})
        except (KeyError, TypeError, AttributeError) as error:
            raise LensError(f"{path} is no layer curve ({error}): make it again") from error


def layer_curve(
    pair: ModelPair,
    towards_finetuned: Sequence[RenderedPrompt],
    towards_base: Sequence[RenderedPrompt],
    *,
    site: Site = "resid_pre",
    direction: Direction = "repair",
    layers: Sequence[int] | None = None,
    control_layers: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool | str = False,
) -> LayerCurve:
    """Patch the prefix at one site of one layer at a time, and see how far the answers move.

    The measure is log p (per token) of the finetuned model's own answer minus that of the base's own
    answer. The rest of the network is the recipient's. All layers are compiled in one prefix pass.

    Args:
        pair: base and finetuned.
        towards_finetuned: the prompts, each with the finetuned model's own answer.
        towards_base: the same prompts with the base's own answer.
        site: which activation of the prefix.
        direction: repair or infect.
        layers: None for all.
        control_layers: at so many evenly spaced layers, run the identity control (donor = recipient) and the
            random control (the same displacement in norm, per token, in a random direction).
        seed: of the random control.
        batch_size: rows per pass.
        progress: show a progress bar.

    Raises:
        LensError: lists of different lengths, or prompts with different prefixes.
    """
    donor_side, recipient_side = DONOR[_direction(direction)], RECIPIENT[direction]
    n = len(towards_finetuned)
    if not n or n != len(towards_base):
        raise LensError(f"{n} responses against {len(towards_base)}: give one of each per prompt, at least one")
    prompt = max(towards_finetuned, key=lambda p: len(p.spans["prefix"]))
    chosen = check_layers(layers, pair.shape.n_layers)
    sides = (donor_side, recipient_side)
    donor, own = (prefix_activations(pair, side, prompt, site, chosen) for side in sides)
    spaced = sorted(
        {chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, control_layers).round()} if control_layers else ()
    )
    series = {"patched": donor, "identity control": own, "random control": _displaced(own, donor, seed)}
    cells = [(name, layer) for name in series for layer in chosen if name == "patched" or layer in spaced]
    with pair.using(donor_side) as model:
        donor_contrast = contrast(model, towards_finetuned, towards_base, batch_size=batch_size)
        donor_cache = PrefixCache.compile(model, prompt)
    values: dict[tuple[str, int], Float[Tensor, " prompt"]] = {}
    with pair.using(recipient_side) as model:
        recipient_contrast = contrast(model, towards_finetuned, towards_base, batch_size=batch_size)
        many = [patch(series[name], sites=site, layers=[layer]) for name, layer in cells]
        compiled = PrefixCache.compile_many(model, prompt, many)
        whole = contrast(model, towards_finetuned, towards_base, prefix_cache=donor_cache, batch_size=batch_size)
        label = "layer curve" if progress is True else progress or None
        for cell, prefix_cache in track(list(zip(cells, compiled, strict=True)), label):
            values[cell] = contrast(
                model, towards_finetuned, towards_base, prefix_cache=prefix_cache, batch_size=batch_size
            )
    nothing = torch.full_like(recipient_contrast, float("nan"))
    names = {"patched": f"{donor_side} {site} of this layer patched in"}
    return LayerCurve(
        layers=chosen,
        contrasts={names.get(s, s): [values.get((s, layer), nothing).tolist() for layer in chosen] for s in series},
        recipient=recipient_contrast.tolist(),
        donor=donor_contrast.tolist(),
        whole=whole.tolist(),
        site=site,
        direction=direction,
        settings={
            "names": dict(pair.names),
            "n": n,
            "seed": seed,
            "fingerprint": prompt.fingerprint,
            "prefix_tokens": len(prompt.span("prefix")),
            "backend": pair.backend,
        },
    )


def _numbers(values: Sequence[float | None]) -> list[float]:
    """JSON has null for a missing number."""
    return [float("nan") if value is None else value for value in values]


def _displaced(own: Activations, donor: Activations, seed: int) -> Activations:
    """`own` moved by as much as the donor differs from it, token by token, but in random directions."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for key, value in own.values.items():
        gap = (donor[key] - value).float().cpu()
        noise = torch.stack([norm_matched_random(token, generator) for token in gap.flatten(0, 1)]).view_as(gap)
        values[key] = value + noise.to(value.device, value.dtype)
    return Activations(own.span, own.tokens, values, own.lengths)
