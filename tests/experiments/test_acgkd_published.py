"""The published teacher: its recorded accuracy and logits."""

import jax
import numpy as np
import pytest

from jaxmethods.data import gfkd
from jaxmethods.errors import InputError
from jaxmethods.experiments.acgkd import teachers
from jaxmethods.experiments.acgkd.config import Config
from jaxmethods.graphs.batching import batch_graphs

needs_published = pytest.mark.skipif(
  not gfkd.archive_path().is_file(),
  reason=f"JAXMETHODS_DATA has no {gfkd.archive_path().name} (the published teacher)",
)


@needs_published
def test_published_teacher():
  """The teacher reaches its recorded accuracies, 0.8947 and 0.8244, and logits."""
  published = gfkd.load()
  material = teachers.load(Config())
  data = material.data

  def logits(data):
    (batch,) = batch_graphs(data, range(len(data.labels)), len(data.labels))
    pooled = jax.jit(material.encoder.apply)(material.teacher.variables, batch)
    return np.asarray(material.teacher.head(pooled))[: len(data.labels)]

  answers = logits(data)
  np.testing.assert_allclose(answers, published.logits[0], rtol=1e-4, atol=1e-4)
  right = answers.argmax(-1) == data.labels
  assert right[material.test].sum() == 51 and len(material.test) == 57
  assert right[material.test].mean() == pytest.approx(0.8947, abs=1e-4)
  assert right[material.train].mean() == pytest.approx(0.8244, abs=1e-4)

  # The graphs of the published code: isolated nodes have no self loop there, so theirs are left out.
  pseudo = published.pseudo
  node_graph = np.repeat(np.arange(len(pseudo.labels)), pseudo.graphs.n_node)
  same = np.setdiff1d(np.arange(len(pseudo.labels)), node_graph[~published.pseudo_self_loop])
  answers = logits(pseudo)
  np.testing.assert_allclose(answers[same], published.logits[1][same], rtol=1e-3, atol=1e-3)
  agrees = published.logits[1].argmax(-1) == pseudo.labels
  assert agrees.mean() == pytest.approx(0.7328, abs=1e-4)
  assert len(same) >= len(pseudo.labels) - 2


def test_a_missing_archive_says_what_to_do(monkeypatch, tmp_path):
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path))
  with pytest.raises(InputError, match=r"gfkd_mutag\.npz: no such file; .* JAXMETHODS_DATA"):
    teachers.load(Config())
