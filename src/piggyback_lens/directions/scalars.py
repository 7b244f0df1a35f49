"""Adapter scalars: what a rank-1 adapter reads. A·x for every token, layer and module of any text.

A rank-1 adapter writes one fixed vector, s·B, times the scalar A·x; the scalars are therefore all that it
does on a text ("Convergent linear representations of emergent misalignment", section on adapter scalars).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.directions.span_sums import batches
from piggyback_lens.errors import LensError
from piggyback_lens.figures.token_scores import TokenScores
from piggyback_lens.models.attachment import edited_modules
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.network import NOTHING, forward
from piggyback_lens.progress import shows, track
from piggyback_lens.vectors.adapters import LoRAAdapter, Place
from piggyback_lens.vectors.adapting import attached

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Scalars:
    """A·x of every token.

    Attributes:
        prompts: the texts.
        places: (layer, module) of each column.
        values: per prompt [token, place].
    """

    prompts: tuple[RenderedPrompt, ...]
    places: tuple[Place, ...]
    values: tuple[Float[Tensor, "_ place"], ...]

    def to_frame(self) -> "pd.DataFrame":
        """One row per prompt, token and place: prompt, position, token, span, layer, module, scalar."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for number, (prompt, values) in enumerate(zip(self.prompts, self.values, strict=True)):
            home = _main_spans(prompt)
            for position, row in enumerate(values.tolist()):
                token = {"prompt": number, "position": position, "token": prompt.pieces[position]}
                token["span"] = home[position]
                rows += [
                    token | {"layer": layer, "module": module, "scalar": scalar}
                    for (layer, module), scalar in zip(self.places, row, strict=True)
                ]
        return pd.DataFrame(rows)

    def means(self, span: str = "response") -> Float[Tensor, "prompt place"]:
        """Mean scalar over the tokens of a span: the features of a probe.

        Raises:
            LensError: a prompt without this span.
        """
        found = []
        for prompt, values in zip(self.prompts, self.values, strict=True):
            where = prompt.span(span)
            found.append(values[where.start : where.stop].mean(0))
        return torch.stack(found)

    def show(self, prompt: int = 0, place: Place | None = None) -> TokenScores:
        """One text, its tokens coloured by their scalar.

        Args:
            prompt: which text.
            place: (layer, module); the only one by default.

        Raises:
            LensError: no such text or place, or several to choose from.
        """
        if not -len(self.prompts) <= prompt < len(self.prompts):
            raise LensError(f"prompt {prompt} was asked, there are {len(self.prompts)}")
        if place not in (None, *self.places) or (place is None and len(self.places) > 1):
            raise LensError(f"place {place}: choose one of {list(self.places)}")
        column = 0 if place is None else self.places.index(place)
        layer, module = self.places[column]
        title = f"A·x of {module} in layer {layer}"
        return TokenScores.of(self.prompts[prompt], self.values[prompt][:, column], title=title)


@shows("adapter scalars")
@torch.no_grad()
def adapter_scalars(
    model: HookedModel,
    adapter: LoRAAdapter,
    prompts: Sequence[RenderedPrompt],
    *,
    active: bool = True,
    batch_size: int = 8,
    progress: bool | str = True,
) -> Scalars:
    """A·x for every token of every prompt.

    Args:
        model: either backend, without the adapter.
        adapter: of rank 1.
        prompts: with or without responses.
        active: whether the adapter acts while it is read (later layers then see what earlier ones wrote).
        batch_size: rows per pass; does not change the numbers.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: another rank, no prompts, or an adapter that does not fit.
    """
    if adapter.rank != 1 or not prompts:
        raise LensError(f"rank {adapter.rank}, {len(prompts)} prompts: scalars are those of a rank-1 adapter on texts")
    places = tuple((layer, module) for layer in adapter.layers for module in adapter.modules)
    found: list[Tensor] = []
    parts = list(batches(prompts, batch_size))
    for rows in track(parts, sizes=[len(rows) for rows in parts]):
        batch = batch_prompts(rows, side="right")
        kept: dict[Place, Tensor] = {}
        readers = {place: _reader(adapter.a[place][0], place, kept) for place in places}
        with attached(model, *([adapter] if active else [])), edited_modules(model, readers):
            forward(model, batch.ids, batch.attention_mask, read=NOTHING)
        together = torch.stack([kept[place] for place in places], dim=-1)
        found += [together[i, : len(prompt.ids)] for i, prompt in enumerate(rows)]
    return Scalars(tuple(prompts), places, tuple(found))


def _reader(a: Tensor, place: Place, kept: dict[Place, Tensor]) -> Any:
    def read(inputs: Tensor, output: Tensor) -> Tensor:
        kept[place] = (inputs.float() @ a.to(inputs.device).float()).cpu()
        return output

    return read


def _main_spans(prompt: RenderedPrompt) -> list[str]:
    names = [""] * len(prompt.ids)
    for name in ("prefix", "query", "postfix", "response"):
        for position in prompt.spans[name].positions if name in prompt.spans else ():
            names[position] = name
    return names


@dataclass(frozen=True, eq=False)
class Probe:
    """A logistic regression: p(label 1) = σ(w·x + c) on standardised features.

    Attributes:
        weights: per feature, for features divided by their standard deviation.
        intercept: c.
        accuracy: on the data it was fitted to.
        held_out: accuracy on folds it was not fitted to, per row (1 right, 0 wrong), in the rows' order.
    """

    weights: tuple[float, ...]
    intercept: float
    accuracy: float
    held_out: tuple[float, ...]


def logistic_probe(
    features: Float[Tensor, "row feature"],
    labels: Int[Tensor, " row"],
    *,
    c: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> Probe:
    """Predict labels from scalars: L2-regularised logistic regression with held-out accuracy.

    The objective is that of scikit-learn's LogisticRegression(C=c) after a StandardScaler:
    ½‖w‖² + c · Σ log-loss, intercept free; standardisation is fitted inside each fold.

    Args:
        features: one row per prompt, such as the means that `adapter_scalars` gives.
        labels: 0 or 1.
        c: inverse strength of the regularisation.
        folds: parts of the cross-validation, stratified by label.
        seed: of the folds.

    Raises:
        LensError: labels other than 0 and 1, or fewer than `folds` rows of one of them.
    """
    x, y = features.cpu().double().numpy(), labels.cpu().numpy()
    counts = [int((y == value).sum()) for value in (0, 1)]
    if sum(counts) != len(y) or len(x) != len(y) or min(counts) < folds or folds < 2:
        raise LensError(
            f"{len(x)} rows, {len(y)} labels, {counts[0]} of 0 and {counts[1]} of 1: a probe with {folds} folds (at "
            "least 2) needs labels 0 and 1, at least as many rows of each"
        )
    draw = np.random.default_rng(seed)
    fold = np.empty(len(y), dtype=int)
    for value in (0, 1):
        rows = np.flatnonzero(y == value)
        fold[draw.permutation(rows)] = np.arange(len(rows)) % folds
    right = np.empty(len(y))
    for part in range(folds):
        inside, outside = fold != part, fold == part
        weights, intercept, mean, spread = _fit(x[inside], y[inside], c)
        right[outside] = (((x[outside] - mean) / spread @ weights + intercept) > 0) == (y[outside] == 1)
    weights, intercept, mean, spread = _fit(x, y, c)
    accuracy = float(((((x - mean) / spread @ weights + intercept) > 0) == (y == 1)).mean())
    return Probe(tuple(weights.tolist()), intercept, accuracy, tuple(right.tolist()))


def _fit(x: Any, y: Any, c: float) -> tuple[Any, float, Any, Any]:
    from scipy.optimize import minimize

    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    scaled, sign = (x - mean) / spread, 2.0 * y - 1

    def objective(theta: Any) -> tuple[float, Any]:
        margin = sign * (scaled @ theta[:-1] + theta[-1])
        loss = np.logaddexp(0, -margin).sum()
        pull = -c * sign * np.exp(-np.logaddexp(0, margin))  # derivative by the score
        gradient = np.append(scaled.T @ pull + theta[:-1], pull.sum())
        return float(0.5 * theta[:-1] @ theta[:-1] + c * loss), gradient

    found = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-8})
    return found.x[:-1], float(found.x[-1]), mean, spread
