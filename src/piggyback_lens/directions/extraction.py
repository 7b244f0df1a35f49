"""Directions measured on activations: mean differences, contrast pairs, PCA, finetuned minus base.

Every function reads all asked layers in one pass over the data, a batch at a time. Means are running sums in
float64, so memory does not grow with the number of rows; PCA keeps one vector per pair and layer.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import length_hint
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.span_sums import Reading, Sums, batches, hash_rows, row_sums
from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.pair import ModelPair, identify
from piggyback_lens.progress import counting, shows
from piggyback_lens.settings import ReadSettings
from piggyback_lens.vectors.direction import Direction, Provenance

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Measured:
    """A measured direction with how far it can be trusted.

    Attributes:
        direction: one vector per layer.
        split_half: per layer, the cosine between the directions of two random halves of the data, one
            number for each random split. Near 1: more data would not change the orientation.
        n: rows per side.
        tokens: tokens per side.
    """

    direction: Direction
    split_half: Mapping[int, tuple[float, ...]]
    n: Mapping[str, int]
    tokens: Mapping[str, int]

    def to_frame(self) -> "pd.DataFrame":
        """One row per layer: norm, and mean, lowest and highest split-half cosine."""
        import pandas as pd

        rows = [
            {"layer": layer, "norm": norm, "split_half": sum(c) / len(c), "lowest": min(c), "highest": max(c)}
            for (layer, norm), c in zip(self.direction.norms.items(), self.split_half.values(), strict=True)
        ]
        return pd.DataFrame(rows).assign(**{f"n_{side}": count for side, count in self.n.items()})


@shows("mean difference")
def mean_difference(
    model: HookedModel,
    showing: Iterable[RenderedPrompt],
    not_showing: Iterable[RenderedPrompt],
    read: ReadSettings = ReadSettings(),
    *,
    n_splits: int = 8,
    seed: int = 0,
    progress: bool | str = True,
) -> Measured:
    """Mean activation on behaviour-showing rows minus that on not-showing rows, per layer.

    As in the emergent-misalignment steering work ("Convergent linear representations"): the mean runs over
    all tokens of all responses, so a long response counts more; weighting="response" takes the mean of each
    response first.

    Args:
        model: either backend.
        showing: rendered conversations that show the behaviour; any iterable, read once.
        not_showing: those that do not.
        read: site, layers, span and which of its tokens, and how rows are weighted.
        n_splits: random splits of the rows into halves, for the split-half cosines.
        seed: of those splits.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: fewer than two rows on a side, or rows without the span.

    Example:
        >>> found = mean_difference(model, conversations[:2], conversations[2:], ReadSettings(layers=[1]))
        >>> found.direction.layers
        (1,)
    """
    where = Reading.of(model, read)
    digest = hashlib.sha256()
    sides: dict[str, Sums] = {}
    for side, rows in (("showing", showing), ("not showing", not_showing)):
        sides[side] = Sums(n_splits, seed)
        with counting(length_hint(rows), f"rows {side}") as advance:
            for prompts in batches(rows, read.batch_size):
                sides[side].add(row_sums(model, prompts, where), where.weighting)
                hash_rows(digest, side, prompts)
                advance(len(prompts))
        sides[side].require_two(side)
    return _measured(
        sides["showing"].means() - sides["not showing"].means(), sides, where,
        sign="positive: more like the rows that show the behaviour",
        provenance=_provenance("mean difference", model, digest.hexdigest(), seed, where),
    )  # fmt: skip


@shows("model difference")
def model_difference(
    pair: ModelPair,
    prompts: Iterable[RenderedPrompt],
    read: ReadSettings = ReadSettings(),
    *,
    n_splits: int = 8,
    seed: int = 0,
    progress: bool | str = True,
) -> Measured:
    """Mean activation of the finetuned model minus the base's, on the same tokens, per layer.

    Args as `mean_difference`; `first` picks the first response tokens, where finetunes differ most.

    Raises:
        LensError: fewer than two rows, or rows without the span.
    """
    digest = hashlib.sha256()
    sums = Sums(n_splits, seed)
    with pair.using("base") as base:
        where = Reading.of(base, read)
    with counting(length_hint(prompts)) as advance:
        for rows in batches(prompts, read.batch_size):
            with pair.using("base") as base:
                before = list(row_sums(base, rows, where))
            with pair.using("finetuned") as finetuned:
                after = row_sums(finetuned, rows, where)
                sums.add(((b - a, n) for (b, n), (a, _) in zip(after, before, strict=True)), where.weighting)
            hash_rows(digest, "rows", rows)
            advance(len(rows))
    sums.require_two("rows")
    about = _provenance("finetuned minus base", None, digest.hexdigest(), seed, where)
    about = replace(about, model=pair.identity("base").to_dict())
    sign = "positive: more like the finetuned model"
    return _measured(sums.means(), {"rows": sums}, where, sign=sign, provenance=about)


@dataclass(frozen=True, eq=False)
class PairDirections:
    """Directions of contrast pairs.

    Attributes:
        mean: the mean of the pairs' differences.
        component: the first principal component of the differences, at unit length.
        explained: per layer, the part of the differences' (centred: variance; else second moment) it explains.
        n: pairs.
    """

    mean: Direction
    component: Direction
    explained: Mapping[int, float]
    n: int


@shows("contrast pairs")
def contrast_pairs(
    model: HookedModel,
    pairs: Iterable[tuple[RenderedPrompt, RenderedPrompt]],
    read: ReadSettings = ReadSettings(),
    *,
    centred: bool = False,
    progress: bool | str = True,
) -> PairDirections:
    """Directions from pairs (showing, not showing): mean difference, and PCA of the differences.

    Each row counts through the mean over its span. The component is oriented so that the mean difference
    projects positively on it. One vector per pair and layer is kept (n · layers · d · 4 bytes).

    Args as `mean_difference`, and:
        centred: subtract the mean difference before the PCA; the component is then the direction in which
            the pairs vary, not the one that they share.

    A layer at which no pair differs has no component: it is left out, and named in a warning.

    Raises:
        LensError: fewer than two pairs, or none that differs anywhere.
    """
    where = Reading.of(model, replace(read, weighting="response"))
    digest, kept = hashlib.sha256(), []
    with counting(length_hint(pairs)) as advance:
        for rows in batches(pairs, read.batch_size):
            sides = [[row[side] for row in rows] for side in (0, 1)]
            means = [[total / n for total, n in row_sums(model, side, where)] for side in sides]
            kept += [(a - b).float() for a, b in zip(*means, strict=True)]
            for name, side in zip(("showing", "not showing"), sides, strict=True):
                hash_rows(digest, name, side)
            advance(len(rows))
    if len(kept) < 2:
        raise LensError(f"{len(kept)} contrast pairs: at least 2 are needed")
    differences = torch.stack(kept)  # [pair, layer, d]
    mean = differences.mean(0)
    about = _provenance("mean of pair differences", model, digest.hexdigest(), None, where)
    sign = "positive: more like the showing side of the pairs"
    direction = Direction(mean, where.layers, where.site, sign, about)
    table = differences - mean if centred else differences
    alive = [i for i in range(len(where.layers)) if bool(table[:, i].any())]
    if not alive:
        raise LensError("the two sides of every pair are the same at these layers: there is no direction")
    if silent := [layer for i, layer in enumerate(where.layers) if i not in alive]:
        warnings.warn(f"layers {silent} do not differ between the sides of any pair, and are left out", stacklevel=2)
        differences, mean = differences[:, alive], mean[alive]
        where = replace(where, layers=tuple(where.layers[i] for i in alive))
        direction = Direction(mean, where.layers, where.site, sign, about)
    found = [principal_component(differences[:, i], centred=centred) for i in range(len(where.layers))]
    pca = replace(about, how=f"first principal component of pair differences ({'' if centred else 'not '}centred)")
    component = Direction(torch.stack([v for v, _ in found]), where.layers, where.site, sign, pca, scale="unit")
    explained = dict(zip(where.layers, (part for _, part in found), strict=True))
    return PairDirections(direction, component, explained, len(kept))


def principal_component(
    differences: Float[Tensor, "n d"], *, centred: bool = False
) -> tuple[Float[Tensor, " d"], float]:
    """The unit vector along which the differences are longest, and its part of their total square.

    Its sign is that of the mean difference.

    Raises:
        LensError: the differences are all zero.
    """
    mean = differences.double().mean(0)
    table = differences.double() - mean if centred else differences.double()
    _, singular, axes = torch.linalg.svd(table, full_matrices=False)
    total = float(singular.square().sum())
    if total == 0:
        raise LensError("the differences are all the same (zero after centring): there is no component")
    axis = axes[0] if float(axes[0] @ mean) >= 0 else -axes[0]
    return axis.float(), float(singular[0] ** 2) / total


def _measured(
    vectors: Tensor, sides: Mapping[str, Sums], where: Reading, *, sign: str, provenance: Provenance
) -> Measured:
    direction = Direction(vectors.float(), where.layers, where.site, sign, provenance)
    halves, *subtracted = [side.half_means() for side in sides.values()]
    for other in subtracted:
        halves = halves - other
    cosines = torch.cosine_similarity(halves[:, 0], halves[:, 1], dim=-1)  # [split, layer]
    split_half = {layer: tuple(cosines[:, i].tolist()) for i, layer in enumerate(where.layers)}
    counts = {side.replace(" ", "_"): sums for side, sums in sides.items()}
    n, tokens = ({side: getattr(sums, what) for side, sums in counts.items()} for what in ("rows", "tokens"))
    return _with_settings(Measured(direction, split_half, n, tokens), {"n": n, "tokens": tokens})


def _with_settings(measured: Measured, more: Mapping[str, object]) -> Measured:
    source = measured.direction.provenance
    source = replace(source, settings={**source.settings, **more})
    return replace(measured, direction=replace(measured.direction, provenance=source))


def _provenance(how: str, model: HookedModel | None, digest: str, seed: int | None, where: Reading) -> Provenance:
    settings = {"span": where.span, "first": where.first, "last": where.last, "weighting": where.weighting}
    identity = None if model is None else identify(model).to_dict()
    return Provenance(how, digest[:16], identity, seed, settings)
