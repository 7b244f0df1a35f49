"""Latents of sparse autoencoders: load, train, check, steer, and take directions apart.

A public namespace of its own, `piggyback_lens.saes`, because it needs the extra `sae`.
"""

from piggyback_lens.saes.latent_attribution import attribute_latents
from piggyback_lens.saes.latent_fit import fit_latents
from piggyback_lens.saes.latent_training import train_sae
from piggyback_lens.saes.latents import Latents, ablate_latent, load_sae, steer_latent
from piggyback_lens.settings import SAESettings

__all__ = [
    "Latents",
    "SAESettings",
    "ablate_latent",
    "attribute_latents",
    "fit_latents",
    "load_sae",
    "steer_latent",
    "train_sae",
]
