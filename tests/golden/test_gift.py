"""GIFT against vectors from the published functions (float64), down to three steps of a tiny CLIP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.methods import gift
from jaxmethods.models.clip import CLIP, OPENAI_TABLE, CLIPConfig
from jaxmethods.models.hugging_face import join_in_proj, split_in_proj
from jaxmethods.models.transformer import normalise
from jaxmethods.models.weights import export_params, import_params
from tests.tensors import below

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def golden(golden_file):
  return golden_file("gift")


def near(found, expected, share=5e-5):
  """Equal up to a share of the largest entry."""
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=share * max(np.abs(expected).max(), 1e-12)
  )


@pytest.mark.parametrize("temperature", [1, 2])
def test_contrastive_distillation(golden, temperature):
  want = below(golden, f"cd/T{temperature}/")
  student, teacher = (jnp.asarray(golden[f"cd/{who}_logits"]) for who in ("student", "teacher"))
  one = functools.partial(gift.distillation, temperature=temperature)
  np.testing.assert_allclose(one(student, teacher), want["image_to_text"], **CLOSE)
  np.testing.assert_allclose(one(student.T, teacher.T), want["text_to_image"], **CLOSE)
  for name, divergence in (("forward_kl", "kl"), ("official_kl_option", "reverse_kl")):
    found = one(student, teacher, divergence=divergence)
    np.testing.assert_allclose(found, want[f"{name}_image_to_text"], **CLOSE)
  gradient = jax.grad(gift.contrastive_distillation)(student, teacher, temperature)
  near(gradient, want["grad_sum"], 1e-5)


def test_alignment(golden):
  prompts, logits = golden["ita/prompt_ids"], jnp.asarray(golden["ita/logits"])
  np.testing.assert_allclose(gift.alignment_target(prompts), golden["ita/target"], **CLOSE)
  for smoothing in (0, 0.2):
    want = below(golden, f"ita/ls{smoothing}/")
    loss = lambda x, s=smoothing: gift.image_text_alignment(x, prompts, s)
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, want["image"] + want["text"], **CLOSE)
    near(gradient, want["grad_sum"], 1e-5)


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_task_loss(golden, smoothing):
  logits, labels = jnp.asarray(golden["task_ce/logits"]), golden["task_ce/labels"]
  found = gift.task_loss(logits, labels, smoothing)
  np.testing.assert_allclose(found, golden[f"task_ce/loss_ls{smoothing}"], **CLOSE)


def test_consolidation(golden):
  of = lambda part: {k: jnp.asarray(v) for k, v in below(golden, f"awc/{part}/").items()}
  importance, params, anchor = gift.fisher(of("grad")), of("param"), of("anchor")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), importance, of("fisher"))
  loss, gradient = jax.value_and_grad(gift.consolidation)(params, anchor, importance)
  np.testing.assert_allclose(loss, golden["awc/loss"], **CLOSE)
  known = gift.consolidation_gradient(params, anchor, importance)
  for found in (gradient, known):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, of("loss_grad"))
  ones = jax.tree.map(jnp.ones_like, params)
  np.testing.assert_allclose(gift.consolidation(params, anchor, ones), golden["l2/loss"], **CLOSE)


def test_static_fisher(golden):
  mean = {"w": jnp.zeros(golden["awc_static/fisher_after_3"].shape)}
  for count, gradient in enumerate(golden["awc_static/grads"]):
    mean = gift.running_fisher(mean, gift.fisher({"w": jnp.asarray(gradient)}), count)
  np.testing.assert_allclose(mean["w"], golden["awc_static/fisher_after_3"], **CLOSE)


def test_zscl(golden):
  of = below(golden, "zscl/")
  teacher = of["scale"] * of["teacher_image"] @ of["teacher_text"].T
  student = of["scale"] * of["student_image"] @ of["teacher_text"].T
  found = gift.distillation(jnp.asarray(student), jnp.asarray(teacher))
  np.testing.assert_allclose(found, of["loss_image"], rtol=2e-5)
  found = gift.distillation(jnp.asarray(student.T), jnp.asarray(teacher.T))
  np.testing.assert_allclose(found, of["loss_text"], rtol=2e-5)


def test_weights_of_several_models(golden):
  mean = golden["we/init"]
  for count, iterate in enumerate(golden["we/iterates"], start=1):
    mean = gift.running_mean(mean, iterate, count)
  np.testing.assert_allclose(mean, golden["we/running_mean"], rtol=1e-6)
  of = below(golden, "wise_ft/")
  found = gift.interpolated(of["finetuned"], of["initial"], float(of["alpha"]))
  np.testing.assert_allclose(found, of["merged"], rtol=1e-6)


def test_metrics(golden):
  found = gift.summary(jnp.asarray(golden["metrics/acc"]))
  for name, published in (("transfer", "transfer"), ("average", "avg"), ("last", "last"),
                          ("forget", "forget_official")):  # fmt: skip
    np.testing.assert_allclose(getattr(found, name), golden[f"metrics/{published}"], rtol=1e-5)
  if "metrics/published_continual_ft_order1" in golden:
    found = gift.summary(jnp.asarray(golden["metrics/published_continual_ft_order1"]))
    np.testing.assert_allclose(found[:3], (44.6, 55.9, 77.3), atol=0.05)


def test_schedule(golden):
  found = gift.rate(golden["schedule/steps"], 1e-5, 100, 1000)
  expected = golden["schedule/lr_base1e-5_warm100_total1000"]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)


class Steps:
  """The recorded tiny CLIP and its batches."""

  def __init__(self, golden):
    self.golden = golden
    heads = tuple(map(int, golden["step/heads_text_vision"]))
    tensors = split_in_proj(below(golden, "step/teacher/"))
    self.model = CLIP(CLIPConfig.from_openai(tensors, heads=heads))
    images = golden["step/images"].transpose(0, 1, 3, 4, 2)
    self.images, self.ref_images = images, golden["step/ref_images"].transpose(0, 1, 3, 4, 2)
    init = functools.partial(self.model.init, jax.random.key(0))
    shapes = jax.eval_shape(init, images[0], golden["step/class_tokens"])["params"]
    read = lambda who: import_params(
      split_in_proj(below(golden, f"step/{who}/")), OPENAI_TABLE, shapes
    )
    self.teacher, self.student = read("teacher"), read("student")

  def logits(self, params, images, texts):
    embed = lambda method, x: normalise(self.model.apply({"params": params}, x, method=method))
    scale = jnp.exp(params["logit_scale"])
    return scale * embed("image_features", images) @ embed("text_features", texts).T

  def task(self, i, params):
    logits = self.logits(params, self.images[i], self.golden["step/class_tokens"])
    return gift.task_loss(logits, self.golden["step/labels"][i])

  def pairs(self, i):
    ids = self.golden["step/ref_prompt_ids"][i]
    return self.ref_images[i], self.golden["step/prompt_tokens"][ids], ids

  def synthetic(self, i, params):
    images, texts, ids = self.pairs(i)
    student, teacher = (self.logits(p, images, texts) for p in (params, self.teacher))
    aligned = gift.image_text_alignment(student, ids)
    return gift.contrastive_distillation(student, teacher) + 0.25 * aligned

  def direction(self, i, params):
    task, synthetic = (functools.partial(f, i) for f in (self.task, self.synthetic))
    return gift.direction(task, synthetic, params, self.teacher)


def test_first_step(golden):
  steps = Steps(golden)
  images, texts, _ = steps.pairs(0)
  out = below(golden, "step/out0/")
  near(steps.logits(steps.student, images, texts), out["ref_logits_student"], 1e-5)
  near(steps.logits(steps.teacher, images, texts), out["ref_logits_teacher"], 1e-5)
  gradients = jax.jit(jax.grad(functools.partial(steps.synthetic, 0)))(steps.student)
  found = jax.jit(functools.partial(steps.direction, 0))(steps.student)
  for part, tree in (
    ("kd_grad0", gradients), ("fisher0", gift.fisher(gradients)), ("total_grad0", found.gradients),
  ):  # fmt: skip
    exported = join_in_proj(export_params(tree, OPENAI_TABLE))
    for name, expected in below(golden, f"step/{part}/").items():
      near(exported[name], expected)


def test_three_steps(golden):
  steps = Steps(golden)
  base, warmup, total = golden["step/hyper_lr_warmup_total"]
  schedule = functools.partial(gift.rate, base=float(base), warmup=int(warmup), total=int(total))
  np.testing.assert_allclose([schedule(s) for s in range(3)], golden["step/lr"], rtol=1e-5)
  optimiser = optax.adamw(schedule, weight_decay=0.0)
  params, state = steps.student, optimiser.init(steps.student)
  want = below(golden, "step/loss/")
  for i in range(3):
    found = jax.jit(functools.partial(steps.direction, i))(params)
    parts = sum(want[name][i] for name in ("cd_image", "cd_text", "ita_image", "ita_text"))
    for name, expected in (
      ("ce", want["ce"][i]),
      ("synthetic", parts),
      ("consolidation", want["wc"][i]),
    ):
      np.testing.assert_allclose(found.losses[name], expected, rtol=2e-4, err_msg=name)
    updates, state = optimiser.update(found.gradients, state, params)
    params = optax.apply_updates(params, updates)
  exported = join_in_proj(export_params(params, OPENAI_TABLE))
  for name, expected in below(golden, "step/final/").items():
    np.testing.assert_allclose(exported[name], expected, rtol=0, atol=2e-4)
  assert params["logit_scale"] == steps.teacher["logit_scale"]
