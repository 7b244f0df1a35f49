"""What is done to activations, at which cells, and the prefix cache that it compiles to."""
