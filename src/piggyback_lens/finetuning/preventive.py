"""Preventive steering: add a direction while training, so that the weights need not learn it.

The vector is added to the residual stream in the passes that are trained and nowhere else; the finished
model is used without it. Penalties compare the model as it will be used, without the vector.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.steps import StepOutput
from piggyback_lens.finetuning.trainables import Trainable
from piggyback_lens.models.attachment import edited_sites
from piggyback_lens.models.backends import check_layers, n_layers_of
from piggyback_lens.settings import check_field

ResidualSite = Literal["resid_pre", "resid_post"]


@dataclass(frozen=True, eq=False)
class PreventiveSteering(Trainable):
    """A `Trainable` that is steered while it trains: resid ← resid + alpha · vector at one layer, all positions.

        train(PreventiveSteering(PeftAdapter(model), vector, layer=12), examples)

    Attributes:
        trainable: what is trained and saved: a PEFT model or a `Trainable`.
        vector: [d_model]; its length counts, nothing is normalised.
        layer: decoder block, from 0.
        alpha: strength; positive moves towards the direction.
        site: "resid_post", the block's output, or "resid_pre", its input.
    """

    trainable: Trainable
    vector: Float[Tensor, " d_model"] = field(repr=False)
    layer: int = 0
    alpha: float = 1.0
    site: ResidualSite = "resid_post"

    steered = True

    @property
    def model(self) -> Any:
        """The model of the trainable that is steered."""
        return self.trainable.model

    def __post_init__(self) -> None:
        check_field(self, "alpha", math.isfinite(self.alpha), "a finite number")
        check_field(self, "site", self.site in ("resid_pre", "resid_post"), '"resid_pre" or "resid_post"')
        if not bool(torch.isfinite(self.vector).all()):
            raise LensError("the steering vector has entries that are not finite; compute it again")
        check_layers([self.layer], n_layers_of(self.model))

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters of the trainable that is steered."""
        return self.trainable.parameters()

    def begin(self, examples: Sequence[RenderedPrompt]) -> None:
        """Tell the trainable that is steered."""
        self.trainable.begin(examples)

    def forward(self, batch: TrainBatch) -> StepOutput:
        """One forward pass with the vector added."""
        with steered(self.model, self.vector, self.layer, alpha=self.alpha, site=self.site):
            return self.trainable.forward(batch)

    def plain_forward(self, batch: TrainBatch) -> StepOutput:
        """A pass without it: the model as it will be used."""
        return self.trainable.forward(batch)

    def settings(self) -> dict[str, object]:
        """The inner trainable's settings, and the steering."""
        data = self.vector.detach().float().cpu().numpy().tobytes()
        steering = {"layer": self.layer, "alpha": self.alpha, "site": self.site, "norm": float(self.vector.norm())}
        return {**self.trainable.settings(), "steering": steering | {"sha256": hashlib.sha256(data).hexdigest()[:16]}}

    def save(self, folder: Path) -> None:
        """The inner trainable's result; the vector is not part of it."""
        self.trainable.save(folder)


@contextmanager
def steered(
    model: nn.Module,
    vector: Float[Tensor, " d_model"],
    layer: int,
    *,
    alpha: float,
    site: ResidualSite = "resid_post",
    acting: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Add alpha · vector to the residual stream at every position of every pass inside the block.

    While `acting` says no, passes are left as they are.

    Raises:
        LensError: no such layer, a vector of another width, or no pass went through the layer.
    """
    calls = 0

    def moved(hidden: Tensor) -> Tensor:
        nonlocal calls
        if not acting():
            return hidden
        calls += 1
        if hidden.shape[-1] != vector.shape[0]:
            raise LensError(
                f"the steering vector has {vector.shape[0]} entries, the residual stream {hidden.shape[-1]}"
            )
        return hidden + (alpha * vector).to(hidden.device, hidden.dtype)

    with edited_sites(model, {(layer, site): moved}):
        yield
    if not calls:
        raise LensError(f"no pass went through layer {layer}, so nothing was steered")
