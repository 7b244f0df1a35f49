"""Finetuning methods on equal terms: cells of a grid, run by any executor, and what they found."""
