"""Find weights, make hooked models of them, and hold the pair of base and finetuned."""
