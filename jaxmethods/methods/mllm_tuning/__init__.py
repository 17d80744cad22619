"""Ways to tune a multimodal model without forgetting (survey of Huang et al., arXiv 2503.04543)."""
