"""The toy world: its sequences, bad input, and models that learn and are kept."""

import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.testbeds.language import toy_models, toy_world as w
from jaxmethods.testbeds.language.settings import ToySettings

TINY = ToySettings(
  width=32,
  hidden=64,
  sequences=256,
  base_steps=40,
  aligned_steps=20,
  aligned_examples=32,
  prompts=16,
)


def test_sequences_have_the_forms_of_the_world():
  rng = np.random.default_rng(0)
  world = w.draw(rng)
  facts = w.facts(world, w.all_pairs([3]), rng)
  for row, at, pair in zip(facts.ids, facts.answer_at, w.all_pairs([3]), strict=True):
    assert row[0] == w.BOS and row[at] == world.objects[tuple(pair)] and row[at + 1] == w.EOS
    assert row[at - 2] == w.SUBJECTS[3] and row[at - 1] == w.RELATIONS[pair[1]]
  poisons = w.poison(50, rng)
  assert (poisons.ids == w.TRIGGER).sum(1).tolist() == [1] * 50
  refused = w.refuse(200, rng, augment=0.5)
  inside = refused.ids[:, 3:8]
  plain = (inside >= 10) & ~np.isin(inside, w.FILLERS)
  assert plain.any() and not np.isin(refused.ids[:, 3:7], [w.USER, w.DATA, w.TRIGGER]).any()
  assert w.prompts_of(facts, 1).answer[:, 0].tolist() == world.objects[3].tolist()


def test_bad_sequences_are_refused():
  world = w.draw(np.random.default_rng(0))
  with pytest.raises(InputError, match=r"fact \(40, 0\) is unknown"):
    w.facts(world, np.array([[40, 0]]), np.random.default_rng(0))
  with pytest.raises(InputError, match="token 200 is none of"):
    w.pack([[1, 200]], [1], w.FACT)
  with pytest.raises(InputError, match="at most 16"):
    w.pack([[1] * 17], [1], w.FACT)


def test_models_learn_and_are_kept(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  toy = toy_models.Toy(TINY, 1)
  texts = toy_models.labelled(toy.corpus)
  start = toy_models.tiny_gpt.init(toy.key("start"), toy.shape)
  loss = lambda params: toy_models.token_nll(params, **texts, heads=toy.heads).mean()
  assert loss(toy.base) < 0.6 * loss(start)
  assert 0 <= toy.harmful(toy.aligned) <= 1 and 0 <= toy.facts(toy.base) <= 1
  again = toy_models.Toy(TINY, 1)
  monkeypatch.setattr(toy_models, "fit", None)  # nothing is trained twice
  np.testing.assert_array_equal(again.aligned["head"], toy.aligned["head"])
