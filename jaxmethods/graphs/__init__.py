"""Graph batches, spectra and layers.

One batch layout for every model: a `jraph.GraphsTuple` with static shapes and these fields.

  nodes    {"features": (N, F) float32, "graph": (N,) int32 index of the node's graph,
            "mask": (N,) bool, and what a model adds}
  edges    {"mask": (E,) bool, and what a model adds}
  senders, receivers   (E,) int32, sorted by receiver, then sender; padding edges last, joining slot
                       N-1 to itself
  n_node, n_edge       (G,) int32; padding slots are nodes of padding graphs, so that the counts add
                       up to N and E and every jraph function works
  globals  {"label": (G,) int32, "mask": (G,) bool}

Slot N-1 is always padding. Padding must never change a result: every loss, normalisation and pooling
reads the masks.
"""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
