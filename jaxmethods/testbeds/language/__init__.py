"""Small causal language models that write and answer."""
