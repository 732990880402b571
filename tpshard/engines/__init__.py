"""Other engines' checkpoints: each a profile in YAML, read in both directions."""
