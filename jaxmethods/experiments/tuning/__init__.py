"""Parameter-efficient tuning of a causal LM on texts."""
