"""EPEAgent against the official filter and letter parser, and an independent float64 computation."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods.epeagent import minimise, policy, retrieval, scoring
from tests.tensors import below


@pytest.fixture
def golden(golden_file):
  return golden_file("epeagent")


@pytest.fixture
def profiles(golden):
  """The authors' profiles that the vectors are about; measured on, never part of the project."""
  folder = Path(os.environ.get("JAXMETHODS_DATA", "")) / "epeagent"
  file = folder / str(np.ravel(golden["access/file"])[0])
  if not file.is_file():
    pytest.skip(f"needs {file.name} of the authors in $JAXMETHODS_DATA/epeagent")
  return json.loads(file.read_text())


def test_access_is_what_the_official_filter_keeps(golden):
  matrix, kept = golden["access/matrix"], golden["access/official_filter_kept"]
  labels = [[a for a, on in zip(golden["access/agents"], row, strict=True) if on] for row in matrix]
  access = policy.access_matrix(labels, list(golden["access/agents"]))
  np.testing.assert_array_equal(access, matrix)
  grants = policy.no_grants(kept.shape[1], *matrix.shape)
  allow = policy.allowed(jnp.asarray(access), grants, round=0)
  np.testing.assert_array_equal(np.moveaxis(np.asarray(allow), 2, 0), kept)


def test_access_of_the_file(golden, profiles):
  labels = [profiles[0][str(field)]["label"] for field in golden["access/fields"]]
  access = policy.access_matrix(labels, list(golden["access/agents"]))
  np.testing.assert_array_equal(access, golden["access/matrix"])


def test_answer_letter(golden):
  found = [scoring.answer_letter(str(text)) or "" for text in golden["answer_letter/text"]]
  assert found == list(golden["answer_letter/expected"])


@pytest.mark.parametrize("form", ["counted", "sorted"])
def test_top_k(golden, form, monkeypatch):
  monkeypatch.setattr(retrieval, "_COUNTED", 1 << 20 if form == "counted" else 0)
  want = below(golden, "topk/")
  k = int(want["k"])
  choose = jax.jit(jax.vmap(lambda s, m: retrieval.top_k(s, m, k)))
  with jax.enable_x64(True):
    found, valid = choose(jnp.asarray(want["scores"]), jnp.asarray(want["mask"]))
  np.testing.assert_array_equal(valid, want["valid"])
  np.testing.assert_array_equal(found, want["indices"])


def test_embedding(golden):
  want = below(golden, "embed/")
  texts = [str(text) for text in want["text"]]
  assert [minimise.normalise(text) for text in texts] == list(want["normalised_text"])
  np.testing.assert_allclose(retrieval.embed(texts, int(want["dim"])), want["vector"], atol=1e-9)


def test_leaks(golden, profiles):
  want = below(golden, "leak/")
  fields = [str(field) for field in golden["access/fields"]]
  found = np.array(
    [
      [[minimise.leaked(user[f]["value"], str(text)) for f in fields] for user in profiles]
      for text in want["message"]
    ]
  )
  np.testing.assert_array_equal(found, want["matrix"])


def test_leak_rate(golden):
  want = below(golden, "leak/")
  count = np.arange(len(want["message"]))
  subject = want["matrix"][count, want["subject_user_index"]]
  rights = golden["access/matrix"][:, want["recipient_agent_index"]].T
  rate = scoring.unauthorised_leak_rate(jnp.asarray(subject), jnp.asarray(rights))
  np.testing.assert_allclose(rate, want["unauthorised_rate"], rtol=1e-5)


def test_reidentification(golden):
  want = below(golden, "reid/")
  messages, users = (jnp.asarray(want[f"{who}_vectors"]) for who in ("message", "user"))
  subject = jnp.asarray(golden["leak/subject_user_index"])
  found = scoring.reidentification(messages, users, subject)
  np.testing.assert_allclose(found.scores, want["scores"], atol=1e-5)
  np.testing.assert_array_equal(found.rank, want["rank"])
  np.testing.assert_allclose(found.mrr, want["mrr"], rtol=1e-5)


def test_membership_auc(golden):
  found = scoring.auc(jnp.asarray(golden["auc/positive"]), jnp.asarray(golden["auc/negative"]))
  np.testing.assert_allclose(found, golden["auc/expected"], rtol=1e-5)


def test_accuracy(golden):
  answer, predicted = (jnp.asarray(golden[f"score/{who}"]) for who in ("answer", "pred"))
  found = scoring.accuracy_percent(answer, predicted)
  np.testing.assert_allclose(found, golden["score/accuracy_percent"], rtol=1e-6)
