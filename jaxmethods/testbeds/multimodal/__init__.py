"""The small LLaVA-style model and its tasks."""
