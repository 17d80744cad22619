import numpy as np
def iid(labels, num_clients, *, seed):
  return [np.sort(p) for p in np.array_split(np.random.default_rng(seed).permutation(len(labels)), num_clients)] if num_clients>1 else [np.arange(len(labels))]
