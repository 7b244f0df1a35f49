"""Experiments with directions: extract, steer, ablate, transfer, read, and the three curves."""
