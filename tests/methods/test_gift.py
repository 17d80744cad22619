"""Properties of GIFT's losses, Fisher statistics, prompt pools and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.errors import InputError
from jaxmethods.methods import gift


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 4))
def test_student_equal_to_teacher(seed, temperature):
  logits = 3 * draw(5, 5, seed=seed)
  value, gradient = jax.value_and_grad(gift.contrastive_distillation)(logits, logits, temperature)
  np.testing.assert_allclose(gradient, 0, atol=1e-5)
  entropy = sum(
    -(jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum(-1).mean()
    for x in (logits / temperature, logits.T / temperature)
  )
  np.testing.assert_allclose(value, temperature**2 * entropy, rtol=1e-4)
  kl = gift.contrastive_distillation(logits, logits, temperature, divergence="kl")
  np.testing.assert_allclose(kl, 0, atol=1e-4)


def test_cross_entropy_and_kl_have_one_gradient():
  student, teacher = draw(4, 4), draw(4, 4, seed=1)
  gradients = [
    jax.grad(lambda s, d=d: gift.distillation(s, teacher, divergence=d))(student)
    for d in ("cross_entropy", "kl")
  ]
  np.testing.assert_allclose(*gradients, atol=1e-6)
  of_teacher = jax.grad(lambda t: gift.contrastive_distillation(student, t))(teacher)
  np.testing.assert_array_equal(of_teacher, 0)


@settings(max_examples=20, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_alignment_target(ids):
  target = gift.alignment_target(jnp.array(ids))
  np.testing.assert_allclose(target.sum(1), 1, atol=1e-6)
  np.testing.assert_array_equal(target, target.T)
  if len(set(ids)) == len(ids):
    np.testing.assert_array_equal(target, np.eye(len(ids)))


def test_alignment_without_smoothing_is_clips_loss():
  from jaxmethods.models.clip import contrastive_loss

  logits = draw(5, 5)
  found = gift.image_text_alignment(logits, jnp.arange(5), 0.0)
  np.testing.assert_allclose(found, 2 * contrastive_loss(logits), rtol=1e-6)


def synthetic(student, teacher, prompts, real=None):
  distilled = gift.contrastive_distillation(student, teacher, rows=real, columns=real)
  return distilled + 0.25 * gift.image_text_alignment(student, prompts, real=real)


def test_the_order_of_pairs_does_not_matter():
  student, teacher, prompts = draw(6, 6), draw(6, 6, seed=1), jnp.array([0, 1, 1, 2, 3, 0])
  order = jnp.array([3, 1, 5, 0, 2, 4])
  turned = (x[order][:, order] for x in (student, teacher))
  found = synthetic(*turned, prompts[order])
  np.testing.assert_allclose(found, synthetic(student, teacher, prompts), rtol=1e-5)


def test_a_ragged_batch_is_the_smaller_batch():
  student, teacher, prompts = draw(6, 6), draw(6, 6, seed=1), jnp.array([0, 1, 1, 2, 0, 0])
  real = jnp.arange(6) < 4
  both = jax.value_and_grad(synthetic)
  value, gradient = both(student, teacher, prompts, real)
  expected, smaller = both(student[:4, :4], teacher[:4, :4], prompts[:4])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[:4, :4], smaller, atol=1e-6)
  np.testing.assert_array_equal(gradient[4:], 0)


def test_padded_classes_change_nothing():
  logits, labels = draw(4, 3), jnp.array([0, 2, 1, 1])
  padded = jnp.concatenate([logits, draw(4, 2, seed=3)], axis=1)
  found = gift.task_loss(padded, labels, classes=jnp.arange(5) < 3)
  np.testing.assert_allclose(found, gift.task_loss(logits, labels), rtol=1e-6)


TREE = {
  "attention": {name: {"kernel": draw(4, 4, seed=i)} for i, name in enumerate(("query", "key"))},
  "mlp": {"kernel": draw(4, 3, seed=5)},
  "nothing": {"kernel": jnp.zeros((2, 2))},
  "layers": {"kernel": draw(3, 4, 2, seed=6) * jnp.array([1.0, 10, 0])[:, None, None]},
  "token": {"embedding": jnp.zeros((5, 2)).at[1].set(1.0)},
  "logit_scale": jnp.ones(()),
}


def test_fisher():
  found = gift.fisher(TREE)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
  np.testing.assert_allclose(found["mlp"]["kernel"].mean(), 1, rtol=1e-5)
  joined = jnp.stack([found["attention"][name]["kernel"] for name in ("query", "key")])
  np.testing.assert_allclose(joined.mean(), 1, rtol=1e-5)
  assert abs(float(joined[0].mean()) - 1) > 1e-3
  np.testing.assert_array_equal(found["nothing"]["kernel"], 0)  # 0 / 0 in the code
  np.testing.assert_allclose(found["layers"]["kernel"].mean((1, 2)), [1, 1, 0], rtol=1e-5)
  np.testing.assert_array_equal(found["token"]["embedding"][jnp.array([0, 2, 3, 4])], 0)
  np.testing.assert_allclose(found["logit_scale"], 1e-6)
  each = gift.fisher(TREE, tensor_of=lambda path: path)
  np.testing.assert_allclose(each["attention"]["key"]["kernel"].mean(), 1, rtol=1e-5)
  scaled = gift.fisher(jax.tree.map(lambda x: 3 * x, TREE))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scaled, found)


def test_direction_without_synthetic_pairs_is_the_tasks():
  params, anchor = draw(5), draw(5, seed=1)
  task = lambda p: jnp.square(p["w"] - 1).sum() * p["logit_scale"]
  tree = lambda x: {"w": x, "logit_scale": jnp.ones(())}
  args = task, lambda p: jnp.zeros(()), tree(params), tree(anchor)
  found = gift.direction(*args, weight=0.0)
  np.testing.assert_array_equal(found.gradients["w"], jax.grad(task)(tree(params))["w"])
  assert found.gradients["logit_scale"] == 0
  ones = gift.direction(*args, importance=lambda f: jax.tree.map(jnp.ones_like, f))
  pull = 2 * (params - anchor)
  np.testing.assert_allclose(ones.gradients["w"], found.gradients["w"] + pull, rtol=1e-5)


def test_no_gradient_through_the_fisher():
  loss = lambda g: gift.fisher({"w": g})["w"].sum()
  np.testing.assert_array_equal(jax.grad(loss)(draw(3)), 0)


def test_herding():
  features = draw(20, 4)
  chosen = np.asarray(gift.herding(features, 5))
  assert len(set(chosen.tolist())) == 5
  expected: list[int] = []
  for _ in range(5):
    errors = [
      np.inf
      if i in expected
      else np.square(features[np.array([*expected, i])].mean(0) - features.mean(0)).sum()
      for i in range(20)
    ]
    expected.append(int(np.argmin(errors)))
  assert chosen.tolist() == expected
  assert sorted(np.asarray(gift.herding(features, 99)).tolist()) == list(range(20))


def test_prompt_pools():
  assert gift.prompt_pool(["a"], []) == ["a"]
  assert gift.prompt_pool(["a"], [["b", "c"], ["b"]]) == ["a", "b", "c", "b"]
  draw_with = lambda seed: gift.drawn_prompts(list("abcd"), 30, np.random.default_rng(seed))
  assert draw_with(0) == draw_with(0) != draw_with(1)
  for broken in (
    lambda: gift.prompt_pool([], []),
    lambda: gift.prompt_pool(["a"], [["b"], []]),
    lambda: gift.drawn_prompts([], 3, np.random.default_rng(0)),
    lambda: gift.drawn_prompts(["a"], 0, np.random.default_rng(0)),
    lambda: gift.interpolated({}, {}, 1.5),
  ):
    with pytest.raises(InputError):
      broken()


def test_summary():
  accuracy = jnp.array([[0.5, 0.25, 0.0], [0.5, 1.0, 0.5], [0.25, 0.5, 1.0]])
  found = gift.summary(accuracy)
  np.testing.assert_allclose(found, (0.25, 0.5, 1.75 / 3, -0.375), rtol=1e-6)
  one = gift.summary(jnp.array([[0.5]]))
  assert jnp.isnan(one.transfer) and one.average == one.last == 0.5


def test_shapes_are_checked_at_the_door():
  with pytest.raises(AssertionError):
    gift.distillation(draw(3, 3), draw(3, 4))
  with pytest.raises(AssertionError):
    gift.image_text_alignment(draw(3, 3), jnp.arange(4))
  with pytest.raises(AssertionError):
    gift.summary(draw(2, 3))
