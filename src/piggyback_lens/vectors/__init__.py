"""Directions, steering vectors and LoRA adapters as values: algebra, files, and how they act on a model."""
