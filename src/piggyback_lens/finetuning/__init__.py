"""One training loop, what it trains, and the objectives that keep a finetune narrow."""
