"""What is done to activations, at which cells, and the prefix cache that it compiles to."""

from piggyback_lens.interventions import kinds as kinds
