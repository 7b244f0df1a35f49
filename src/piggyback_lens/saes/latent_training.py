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
from piggyback_lens.models.backends import HookedModel, Site, check_layers, hook_name, shape_of
from piggyback_lens.models.pair import identify
from piggyback_lens.progress import shown
from piggyback_lens.saes.latent_activations import OUTLIER, TokenSource, site_activations
from piggyback_lens.saes.latents import Latents, load_sae, require_sae_lens

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


def train_sae(
    model: HookedModel,
    texts: Sequence[TokenSource],
    *,
    layer: int,
    out: str | Path,
    site: Site = "resid_post",
    d_sae: int = 2048,
    k: int | None = None,
    l1: float | None = None,
    steps: int = 300,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    span: str = "all",
    texts_per_pass: int = 8,
) -> TrainedSAE:
    """Train a TopK SAE, or one with an L1 penalty, on the activations of some texts, and save it for `load_sae`.

    All activations are kept in memory (tokens · width · 4 bytes). The decoder's bias starts at their mean. The
    rate rises over the first twentieth of the steps and falls to zero over the last fifth. A latent that was
    silent for a tenth of the steps counts as dead and is helped by sae-lens' auxiliary loss (TopK only).

    Args:
        model: either backend.
        texts: windows of plain text (`texts.text_windows`), conversations or token ids.
        layer: where to read.
        out: folder for the SAE; it must not hold one already.
        site: where to read.
        d_sae: number of latents.
        k: active latents per token; 32 if neither k nor l1 is given.
        l1: weight of the L1 penalty instead, in scaled units.
        steps: of training.
        batch_size: tokens per step, drawn without replacement until all were seen.
        lr: highest learning rate (Adam).
        seed: of the first weights and the order of the tokens.
        span: which tokens of conversations.
        texts_per_pass: texts that go through the model together.

    Raises:
        LensError: sae-lens is not installed, settings that make no sense, too few tokens, or a folder in use.
    """
    sae_lens, folder = require_sae_lens(), Path(out)
    (layer,) = check_layers(layer, shape_of(model).n_layers)
    k = 32 if k is None and l1 is None else k
    _check_settings(folder, d_sae, k, l1, steps, batch_size)
    rows = list(site_activations(model, texts, site=site, layer=layer, span=span, batch_size=texts_per_pass))
    activations = torch.cat(rows).cpu()
    if len(activations) < batch_size:
        raise LensError(f"{len(activations)} tokens for batches of {batch_size}: give more text or smaller batches")
    about = _about(model, activations, site, layer, steps, batch_size, lr, seed, span)
    metadata = sae_lens.saes.sae.SAEMetadata(**about, context_size=max(map(len, rows)) + 1)
    sae = _new_sae(sae_lens, activations, d_sae, k, l1, steps, seed, metadata)
    losses = _fit(sae_lens, sae, activations, steps, batch_size, lr, seed)
    sae.save_inference_model(folder)
    return TrainedSAE(load_sae(folder, model=model, site=site, layer=layer), tuple(losses), len(activations), folder)


def _check_settings(folder: Path, d_sae: int, k: int | None, l1: float | None, steps: int, batch_size: int) -> None:
    if k is not None and l1 is not None:
        raise LensError(f"k={k} and l1={l1}: give k for a TopK SAE or l1 for a penalty, not both")
    if k is not None and not 1 <= k <= d_sae:
        raise LensError(f"k={k} of {d_sae} latents: k lies in 1..d_sae")
    if l1 is not None and l1 < 0:
        raise LensError(f"l1={l1}: the weight of the penalty is not negative")
    if steps < 1 or batch_size < 1:
        raise LensError(f"steps={steps}, batch_size={batch_size}: each must be at least 1")
    if (folder / "cfg.json").exists():
        raise LensError(f"{folder} holds an SAE already: choose another folder, or load it with load_sae")


def _about(
    model: HookedModel, activations: Tensor, site: Site, layer: int, steps: int, batch_size: int, lr: float, seed: int,
    span: str,
) -> dict[str, Any]:  # fmt: skip
    """What `load_sae` checks, under sae-lens' names, and the run's settings under ours."""
    digest = hashlib.sha256(activations.numpy().tobytes()).hexdigest()[:16]
    own = {"model": identify(model).to_dict(), "activations": digest, "tokens": len(activations), "span": span}
    own |= {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "first_token": "left out"}
    own["longest"] = OUTLIER * float(activations.norm(dim=1).median())
    return {
        "model_name": PurePath(str(model.cfg.model_name)).name,  # a folder's name at most, never a path
        "hook_name": hook_name(model, site, layer),
        "hook_layer": layer,
        "seqpos_slice": [1, None],
        "piggyback_lens": own,
    }


def _new_sae(
    sae_lens: Any, activations: Float[Tensor, "token d"], d_sae: int, k: int | None, l1: float | None, steps: int,
    seed: int, metadata: Any,
) -> Any:  # fmt: skip
    width = activations.shape[1]
    shared = {"d_in": width, "d_sae": d_sae, "normalize_activations": "expected_average_only_in", "metadata": metadata}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if k is not None:
            sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**shared, k=k))
        else:
            config = sae_lens.StandardTrainingSAEConfig(**shared, l1_coefficient=l1, l1_warm_up_steps=steps // 10)
            sae = sae_lens.StandardTrainingSAE(config)
    scale = math.sqrt(width) / float(activations.norm(dim=1).mean())
    with torch.no_grad():
        sae.b_dec.copy_(activations.mean(0) * scale)
    return sae


def _fit(
    sae_lens: Any, sae: Any, activations: Float[Tensor, "token d"], steps: int, batch_size: int, lr: float, seed: int
) -> list[float]:
    """Run sae-lens' trainer; the loss of every step."""
    config = sae_lens.config.SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=0.0,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=len(activations) // batch_size,
    )
    trainer = sae_lens.SAETrainer(config, sae, _batches(activations, batch_size, seed))
    losses: list[float] = []
    trainer.step = _recorded(trainer.step, losses)
    with _quiet():
        trainer.fit()
    return losses


def _recorded(step: Callable[[Tensor], Any], losses: list[float]) -> Callable[[Tensor], Any]:
    def recorded(batch: Tensor) -> Any:
        output = step(batch)
        losses.append(float(output.loss.detach()))
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
    """Without sae-lens' progress bars where nobody watches."""
    from sae_lens.training import activation_scaler, sae_trainer

    kept = [(module, module.tqdm) for module in (activation_scaler, sae_trainer)]
    try:
        for module, bar in kept:
            module.tqdm = partial(bar, disable=not shown())
        yield
    finally:
        for module, bar in kept:
            module.tqdm = bar
