"""EPEAgent: agents that cooperate without telling what they need not (arXiv 2503.08175).

Axes everywhere: U users, F fields of a profile, N agents, R rounds. Rights are arrays, and so is the
taint of a message: the set of fields whose content it carries.

  policy     who may see which field: access matrix, grants that expire, default deny
  graph      who speaks to whom in a round: order, cycles, dynamic nodes
  taint      what a message carries, what the server lets through, the flow of a whole conversation
  retrieval  embeddings, and top-k with the mask of rights applied before
  minimise   the text side: leaks found, spans cut, messages composed anew
  scoring    utility and privacy of the paper; leak metrics without a judge
  guard      the protection around agents that are plain callables
"""
