"""Low-rank and other parameter-efficient updates as trees beside frozen parameters.

`adapter.py` says what an adapter is and applies it. The kinds: `low_rank.py` (LoRA, rsLoRA, DoRA, VeRA,
PiSSA, MiLoRA, MoSLoRA, AdaLoRA, LoRAMoE), `scaling.py` (IA3, OFT), `bottleneck.py`, `prompts.py`,
`selective.py` (BitFit, masked tuning).
"""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
