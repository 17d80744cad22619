"""EPEAgent: profiles, questions, conversations of agents, and what of it leaks."""
