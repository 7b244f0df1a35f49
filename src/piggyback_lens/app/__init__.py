"""The command line, and what it runs: models and prompts in, a folder with results and a report out."""
