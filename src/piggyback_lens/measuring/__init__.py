"""What is measured: generated answers and their behaviour, probabilities of given responses and texts."""
