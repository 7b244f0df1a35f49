"""From a conversation to token ids with exact spans, and back to something a person can look at."""
