"""Ways to tune a model without forgetting, behind one interface and one training step."""
