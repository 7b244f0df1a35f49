"""Train a small SAE on cached activations with sae-lens' own trainer, offline.

Normalisation: during training activations are multiplied by one number, so that their mean length is √d_in
("expected_average_only_in"); at the end it is folded into the weights, and the saved SAE reads the model's own
activations. The first token of every text is left out, and so are other attention sinks (`latent_activations.OUTLIER`).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel, check_layers, hook_name, shape_of
from piggyback_lens.models.pair import identify
from piggyback_lens.progress import counting, shows
from piggyback_lens.saes.latent_activations import OUTLIER, TokenSource, site_activations
from piggyback_lens.saes.latents import Latents, load_sae, require_sae_lens
from piggyback_lens.settings import SAESettings

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class TrainedSAE:
    """A trained SAE with what happened in its training.

    Attributes:
        latents: the SAE as it was saved, loaded and checked.
        losses: of every step: mean over the batch of the squared error, summed over the width, in scaled units
            (a reconstruction of zero has about d_in), plus the sparsity or dead-latent term.
        tokens: tokens whose activations were cached.
        folder: where it was saved.
    """

    latents: Latents
    losses: tuple[float, ...]
    tokens: int
    folder: Path

    def to_frame(self) -> "pd.DataFrame":
        """One row per step: step, loss."""
        import pandas as pd

        return pd.DataFrame({"step": range(len(self.losses)), "loss": self.losses})


@shows("training of an SAE")
def train_sae(
    model: HookedModel,
    texts: Sequence[TokenSource],
    settings: SAESettings = SAESettings(),
    *,
    layer: int,
    out: str | Path,
    progress: bool | str = True,
) -> TrainedSAE:
    """Train a TopK SAE, or one with an L1 penalty, on the activations of some texts, and save it for `load_sae`.

    All activations are kept in memory (tokens · width · 4 bytes). The decoder's bias starts at their mean. The
    rate rises over the first twentieth of the steps and falls to zero over the last fifth. A latent that was
    silent for a tenth of the steps counts as dead and is helped by sae-lens' auxiliary loss (TopK only).

    Args:
        model: either backend.
        texts: windows of plain text (`text_windows`), conversations or token ids.
        settings: where to read, how many latents, how long.
        layer: where to read.
        out: folder for the SAE; it must not hold one already.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: sae-lens is not installed, settings that make no sense, too few tokens, or a folder in use.
    """
    sae_lens, folder = require_sae_lens(), Path(out)
    (layer,) = check_layers(layer, shape_of(model).n_layers)
    if (folder / "cfg.json").exists():
        raise LensError(f"{folder} holds an SAE already: choose another folder, or load it with load_sae")
    site, size = settings.site, settings.batch_size
    read = {"site": site, "layer": layer, "span": settings.span, "batch_size": settings.texts_per_pass}
    rows = list(site_activations(model, texts, **read))  # type: ignore[arg-type]
    activations = torch.cat(rows).cpu()
    if len(activations) < size:
        raise LensError(f"{len(activations)} tokens for batches of {size}: give more text or smaller batches")
    about = _about(model, activations, layer, settings)
    metadata = sae_lens.saes.sae.SAEMetadata(**about, context_size=max(map(len, rows)) + 1)
    sae = _new_sae(sae_lens, activations, settings, metadata)
    losses = _fit(sae_lens, sae, activations, settings)
    sae.save_inference_model(folder)
    return TrainedSAE(load_sae(folder, model=model, site=site, layer=layer), tuple(losses), len(activations), folder)


def _about(model: HookedModel, activations: Tensor, layer: int, settings: SAESettings) -> dict[str, Any]:
    """What `load_sae` checks, under sae-lens' names, and the run's settings under ours."""
    digest = hashlib.sha256(activations.numpy().tobytes()).hexdigest()[:16]
    own = {"model": identify(model).to_dict(), "activations": digest, "tokens": len(activations)}
    own |= {"span": settings.span, "steps": settings.steps, "batch_size": settings.batch_size}
    own |= {"lr": settings.learning_rate, "seed": settings.seed, "first_token": "left out"}
    own["longest"] = OUTLIER * float(activations.norm(dim=1).median())
    return {
        "model_name": PurePath(str(model.cfg.model_name)).name,  # a folder's name at most, never a path
        "hook_name": hook_name(model, settings.site, layer),
        "hook_layer": layer,
        "seqpos_slice": [1, None],
        "piggyback_lens": own,
    }


def _new_sae(sae_lens: Any, activations: Float[Tensor, "token d"], settings: SAESettings, metadata: Any) -> Any:
    width = activations.shape[1]
    shared = {"d_in": width, "d_sae": settings.d_sae, "normalize_activations": "expected_average_only_in"}
    shared |= {"metadata": metadata}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # and not that of every card
        if settings.l1 is None:
            k = 32 if settings.k is None else settings.k
            sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**shared, k=k))
        else:
            penalty = {"l1_coefficient": settings.l1, "l1_warm_up_steps": settings.steps // 10}
            sae = sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(**shared, **penalty))
    scale = math.sqrt(width) / float(activations.norm(dim=1).mean())
    with torch.no_grad():
        sae.b_dec.copy_(activations.mean(0) * scale)
    return sae


def _fit(sae_lens: Any, sae: Any, activations: Float[Tensor, "token d"], settings: SAESettings) -> list[float]:
    """Run sae-lens' trainer; the loss of every step."""
    steps, size = settings.steps, settings.batch_size
    config = sae_lens.config.SAETrainerConfig(
        total_training_samples=steps * size,
        train_batch_size_samples=size,
        lr=settings.learning_rate,
        lr_end=0.0,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=len(activations) // size,
    )
    trainer = sae_lens.SAETrainer(config, sae, _batches(activations, size, settings.seed))
    losses: list[float] = []
    with _quiet(), counting(steps, "steps") as advance:
        trainer.step = _recorded(trainer.step, losses, advance)
        trainer.fit()
    return losses


def _recorded(
    step: Callable[[Tensor], Any], losses: list[float], advance: Callable[[int], None]
) -> Callable[[Tensor], Any]:
    def recorded(batch: Tensor) -> Any:
        output = step(batch)
        losses.append(float(output.loss.detach()))
        advance(1)
        return output

    return recorded


def _batches(activations: Float[Tensor, "token d"], size: int, seed: int) -> Iterator[Float[Tensor, "batch d"]]:
    """Random batches without end; every token once before any comes again, but for a remainder of each round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield activations[order[start : start + size]]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without sae-lens' own progress bars."""
    from sae_lens.training import activation_scaler, sae_trainer

    kept = [(module, module.tqdm) for module in (activation_scaler, sae_trainer)]
    try:
        for module, bar in kept:
            module.tqdm = partial(bar, disable=True)
        yield
    finally:
        for module, bar in kept:
            module.tqdm = bar
