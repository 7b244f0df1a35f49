"""Latents of sparse autoencoders: load, train, check, steer, and take directions apart."""
