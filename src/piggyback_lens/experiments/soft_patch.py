"""The least patch that restores the base: one coefficient for every prefix token and band of layers, learnt.

The finetuned model reads, at prefix token t and in the layers of band b, keys k + c (k0 - k) and values v + c (v0 - v),
where k, v are its own and k0, v0 the base's, and c = c[t, b] lies between 0 and 1. All coefficients 0 is the finetuned
model, all 1 the patch of the whole prefix. They are moved by Adam, and put back into [0, 1] after each step, to make
KL(base || patched), in nats per token of the base's own answers, small, plus `sparsity` times their mean. What stays
near 1 is needed to restore the base; unlike the cells of a map, tokens that only work together are found together.

What is blended are the keys and values as attention reads them, each layer by itself: a token that is patched below is
not computed anew above, as it would be by an intervention within the prefix's pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import questions_of
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.conversations.token_view import visible
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import measure_facts, own_contrast
from piggyback_lens.experiments.cells import require_one_prefix
from piggyback_lens.experiments.experiment import prompt_facts
from piggyback_lens.intervals import interval_text, mean_interval, recovery
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied
from piggyback_lens.maths import kl_per_token
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.measuring.scoring import predicting_columns
from piggyback_lens.models.backends import HookedModel, device_of, dtype_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.states import state_from_keys_values
from piggyback_lens.progress import counting, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Number, Result
from piggyback_lens.results.run import Run
from piggyback_lens.settings import SoftPatchSettings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONDITIONS = ("finetuned", "soft patch", "other tokens control", "whole prefix patched")
"""No coefficient, the learnt ones, these dealt to other tokens within each band, and all 1."""


@dataclass(frozen=True, repr=False)
class SoftPatchResult(Result):
    """Learnt coefficients, and what they restore on prompts that they were not learnt on.

    Attributes:
        tokens: text of every prefix token.
        bands: first and last layer of every band.
        coefficients: [token][band], from 0 (the finetuned model's keys and values) to 1 (the base's).
        history: for every step its kl (nats per token) and the mean coefficient.
        kl: by condition, KL(base || it) of every held-out prompt, a mean over its answer's tokens.
        questions: of the held-out prompts.
        settings: names, template, versions, and how it was learnt.
    """

    name: ClassVar = "soft_patch.1"
    tokens: tuple[str, ...]
    bands: tuple[tuple[int, int], ...]
    coefficients: list[list[Number]]
    history: list[dict[str, Number]]
    kl: dict[str, list[Number]]
    questions: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> "pd.DataFrame":
        """One row per token and band: position, token, band, value (the coefficient). One fit has no interval."""
        import pandas as pd

        rows = [
            {"position": at, "token": token, "band": f"{low}-{high}", "value": self.coefficients[at][number]}
            for at, token in enumerate(self.tokens)
            for number, (low, high) in enumerate(self.bands)
        ]
        unknown = {"low": float("nan"), "high": float("nan"), "n": self.settings["trained_on"]}
        return pd.DataFrame(rows).assign(**unknown, reason="one fit: no interval")

    @property
    def restored(self) -> "pd.DataFrame":
        """By condition: kl (mean over held-out prompts), and value (fraction of the finetuned's KL that is gone)."""
        import pandas as pd

        rows = []
        zero = [0.0] * len(self.questions)
        for name, own in self.kl.items():
            gone = recovery(own, self.kl["finetuned"], zero, self.questions, rate=False)
            numbers = {"value": gone.value, "low": gone.low, "high": gone.high, "n": gone.n, "reason": gone.reason}
            rows.append({"condition": name, "kl": mean_interval(own, self.questions, rate=False).value, **numbers})
        return pd.DataFrame(rows)

    @property
    def verdict(self) -> str:
        """What the coefficients restore, what the whole prefix does, and where they lie."""
        found = {row["condition"]: row for row in self.restored.to_dict("records")}
        texts = {name: interval_text(row["value"], row["low"], row["high"]) for name, row in found.items()}
        values = np.array(self.coefficients)
        top = [
            f"token {at} {visible(self.tokens[at])!r} layers {self.bands[band][0]}-{self.bands[band][1]} ({value:.2f})"
            for value, at, band in sorted(
                ((values[i, j], i, j) for i, j in np.ndindex(*values.shape) if values[i, j] >= 0.5), reverse=True
            )[:3]
        ]
        most = f"; largest: {', '.join(top)}" if top else "; none reaches 0.5"
        return (
            f"With {values.mean():.0%} of the patch, {texts['soft patch']} of the KL to the base is gone on "
            f"{len(self.questions)} held-out prompts (whole prefix {texts['whole prefix patched']}, the same "
            f"coefficients at other tokens {texts['other tokens control']}){most}."
        )

    def figure(self) -> "go.Figure":
        """The coefficients, token by band of layers."""
        from piggyback_lens.figures.plots import DIVERGING, Axis, heatmap_figure

        names = self.settings["names"]
        values = np.array(self.coefficients)
        restored = self.restored.set_index("condition")["value"]
        about = (
            f"1: the base's keys and values, 0: the finetuned model's; mean {values.mean():.2f}; KL to the base gone "
            f"on {len(self.questions)} held-out prompts: {restored['soft patch']:.2f}, with the whole prefix "
            f"{restored['whole prefix patched']:.2f}"
        )
        figure = heatmap_figure(
            values.T,
            Axis("token of the prefix", [text.replace(" ", "·", 1) for text in self.tokens]),
            Axis("layers", [f"{low}-{high}" for low, high in self.bands], bottom_up=True),
            heading=(f"Learnt soft patch: {names['finetuned']} and {names['base']}", about),
            quantity="coefficient",
            least_limit=1.0,
        )
        return figure.update_traces(zmin=0, colorscale=[(2 * at - 1, colour) for at, colour in DIVERGING if at >= 0.5])

    def report(self) -> Report:
        """The coefficients, and what they restore."""
        notes = ["Coefficients are one fit; what they restore is of prompts that they were not learnt on."]
        figures = [("Learnt coefficients, token by band of layers.", self.figure())]
        return Report(
            "Piggyback lens: soft patch", self.verdict, self.restored, figures, notes=notes, card=self.settings
        )

    def check(self) -> None:
        """Refuse coefficients and prompts that do not belong together."""
        shape = {len(row) for row in self.coefficients}
        if len(self.coefficients) != len(self.tokens) or shape != {len(self.bands)}:
            raise ValueError(
                f"{len(self.coefficients)} rows of {sorted(shape)} coefficients, {len(self.tokens)} tokens"
            )
        if set(self.kl) != set(CONDITIONS) or {len(own) for own in self.kl.values()} != {len(self.questions)}:
            raise ValueError(f"kl of {sorted(self.kl)}, {len(self.questions)} questions")


@shows("soft patch")
def soft_patch(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    settings: SoftPatchSettings = SoftPatchSettings(),
    *,
    measure: AnswerContrast | None = None,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> SoftPatchResult:
    """Learn which prefix tokens and layers have to be the base's, so that the finetuned model answers as the base.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix; every `held_out`-th is only measured.
        settings: bands, sparsity, and how it is learnt.
        measure: an `AnswerContrast`, of which the base's answers are used; None lets both models answer, greedily.
        out: folder of the run, which keeps the answers and the result. The coefficients of a run that was stopped are
            learnt anew, to the same numbers.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: prompts with different prefixes, or fewer than are needed to learn on some and measure on others;
            more bands than layers.

    Example:
        >>> found = soft_patch(pair, prompts, SoftPatchSettings(bands=1, steps=2, held_out=3))
        >>> found.to_frame()["band"].unique().tolist()
        ['0-2']
    """
    length, n_layers = require_one_prefix(prompts), pair.shape.n_layers
    held = list(range(settings.held_out - 1, len(prompts), settings.held_out))
    learnt = [i for i in range(len(prompts)) if i not in held]
    if not held or not learnt:
        raise LensError(f"{len(prompts)} prompts with held_out={settings.held_out}: give at least {settings.held_out}")
    if settings.bands > n_layers:
        raise LensError(f"{settings.bands} bands of {n_layers} layers: choose 1 to {n_layers}")
    facts = prompt_facts(pair, prompts) | {"trained_on": len(learnt), **asdict(settings)}
    identity = {"measure": measure_facts(measure, tokens=settings.answer_tokens), "settings": facts}
    with Run.open(out, "soft_patch", identity, models=pair.identities(), prompt=prompts[0]) as run:
        if (done := run.result(SoftPatchResult.load)) is not None:
            return done
        rows = (measure or own_contrast(run, pair, prompts, tokens=settings.answer_tokens)).against
        with pair.using("base") as model:
            donor, reference = PrefixCache.compile(model, prompts[0]), _reference(model, rows, length)
        with pair.using("finetuned") as model:
            blend = Blend.of(model, PrefixCache.compile(model, prompts[0]), donor, settings.bands)
            with torch.enable_grad():
                found, history = learn(blend, [rows[i] for i in learnt], [reference[i] for i in learnt], settings)
            generator = torch.Generator().manual_seed(settings.seed)
            dealt = torch.stack([c[torch.randperm(length, generator=generator)] for c in found.T], dim=1)
            each = (torch.zeros_like(found), found, dealt, torch.ones_like(found))
            with torch.no_grad():
                kl = {
                    name: [float(blend.kl(own, [rows[i]], [reference[i]])) for i in held]
                    for name, own in zip(CONDITIONS, each, strict=True)
                }
        pieces = tuple(prompts[0].pieces[:length])
        asked = questions_of([prompts[i] for i in held])
        facts |= {"versions": versions()}
        bands = tuple((part[0], part[-1]) for part in blend.parts)
        return run.finish(SoftPatchResult(pieces, bands, found.tolist(), history, kl, asked, facts))


@dataclass(frozen=True, eq=False)
class Blend:
    """The finetuned model on a prefix between its own and the base's.

    Attributes:
        model: the finetuned model.
        own: its keys and values of the prefix, and how far they are from the base's.
        parts: the layers of every band.
    """

    model: HookedModel
    own: Mapping[str, tuple[Float[Tensor, "layer kv pos d"], Float[Tensor, "layer kv pos d"]]]
    parts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: HookedModel, own: PrefixCache, donor: PrefixCache, bands: int) -> "Blend":
        """Between two prefixes, in equal bands of layers."""
        device = device_of(model)
        sides: dict[str, tuple[Tensor, Tensor]] = {}
        for name in ("keys", "values"):
            mine, theirs = (getattr(cache, name).to(device, torch.float32) for cache in (own, donor))
            sides[name] = (mine, theirs - mine)
        parts = np.array_split(np.arange(len(own.keys)), bands)
        return cls(model, sides, tuple(tuple(int(layer) for layer in part) for part in parts))

    def at(self, coefficients: Float[Tensor, "pos band"]) -> tuple[Float[Tensor, "layer kv pos d"], ...]:
        """Keys and values of the prefix under coefficients, with gradient."""
        sizes = torch.tensor([len(part) for part in self.parts])
        each = coefficients.T.repeat_interleave(sizes.to(coefficients.device), dim=0)
        weight = each.to(self.own["keys"][0].device)[:, None, :, None]
        dtype = dtype_of(self.model)
        return tuple((mine + weight * gap).to(dtype) for mine, gap in self.own.values())

    def kl(
        self,
        coefficients: Float[Tensor, "pos band"],
        rows: Sequence[RenderedPrompt],
        reference: Sequence[Float[Tensor, "_ vocab"]],
    ) -> Float[Tensor, ""]:
        """KL(base || this) per answer token, a mean over each row's tokens, then over rows."""
        keys, values = (side[:, None].expand(-1, len(rows), -1, -1, -1) for side in self.at(coefficients))
        logits = _answer_logits(self.model, rows, keys, values)
        each = [
            kl_per_token(base[None].to(own.device), own[None]).mean()
            for base, own in zip(reference, logits, strict=True)
        ]
        return torch.stack(each).mean()


def learn(
    blend: Blend,
    rows: Sequence[RenderedPrompt],
    reference: Sequence[Float[Tensor, "_ vocab"]],
    settings: SoftPatchSettings,
) -> tuple[Float[Tensor, "pos band"], list[dict[str, float]]]:
    """Coefficients that make the model on these rows like the reference, and what each step found."""
    length = blend.own["keys"][0].shape[2]
    coefficients = torch.full((length, len(blend.parts)), settings.start, requires_grad=True)
    optimiser = torch.optim.Adam([coefficients], lr=settings.learning_rate)
    order, generator = list[int](), torch.Generator().manual_seed(settings.seed)
    history: list[dict[str, float]] = []
    with counting(settings.steps) as advance:
        for step in range(settings.steps):
            if len(order) < min(settings.batch_size, len(rows)):
                order += torch.randperm(len(rows), generator=generator).tolist()
            chosen, order = order[: settings.batch_size], order[settings.batch_size :]
            kl = blend.kl(coefficients, [rows[i] for i in chosen], [reference[i] for i in chosen])
            mean = coefficients.mean()
            optimiser.zero_grad()
            (gradient,) = torch.autograd.grad(kl + settings.sparsity * mean.to(kl.device), [coefficients])
            coefficients.grad = gradient
            optimiser.step()
            with torch.no_grad():
                coefficients.clamp_(0, 1)
            history.append({"step": float(step), "kl": float(kl.detach()), "mean": float(mean.detach())})
            advance(1)
    return coefficients.detach(), history


def _reference(model: HookedModel, rows: Sequence[RenderedPrompt], length: int) -> list[Float[Tensor, "_ vocab"]]:
    """The base's logits of every row's answer, on its own prefix."""
    own = PrefixCache.compile(model, rows[0])
    dtype, device = dtype_of(model), device_of(model)
    assert len(own) == length
    found = []
    with torch.no_grad():
        for row in rows:
            keys, values = (x[:, None].to(device, dtype) for x in (own.keys, own.values))
            found.append(_answer_logits(model, [row], keys, values)[0].cpu())
    return found


def _answer_logits(
    model: HookedModel,
    rows: Sequence[RenderedPrompt],
    keys: Float[Tensor, "layer row kv pos d"],
    values: Float[Tensor, "layer row kv pos d"],
) -> list[Float[Tensor, "_ vocab"]]:
    """Logits that predict every row's answer, on top of a prefix."""
    past, device = keys.shape[3], device_of(model)
    batch = batch_prompts(rows, side="right")
    read, counts = predicting_columns(rows, past)
    state = state_from_keys_values(model, list(keys), list(values))
    ids, mask = batch.ids[:, past:].to(device), batch.attention_mask[:, past:].to(device)
    with applied(model, Placement.of(batch, ready=past), ()):
        logits = forward(model, ids, mask, state=state, read=read.to(device))
    return [own[:count] for own, count in zip(logits, counts, strict=True)]
