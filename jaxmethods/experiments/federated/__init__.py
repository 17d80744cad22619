"""Plain federated learning on data, models and clients of one's own."""
