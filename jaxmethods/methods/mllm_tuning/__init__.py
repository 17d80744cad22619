"""The suite of ways to tune a multimodal model without forgetting (survey, Huang et al., arXiv 2503.04543)."""
