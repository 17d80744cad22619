"""Human interaction: clips, what is put beside them, networks, an evaluator, and scores."""
