"""AdaFreq against vectors of the released functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods import adafreq
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViT, ViTConfig, resized_position
from jaxmethods.stats import retrieval


@pytest.fixture
def golden(golden_file):
  return golden_file("adafreq")


def relative(got, want, tolerance=1e-4):
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_high_pass(golden):
  images, deviation = golden["freq/image"].transpose(0, 2, 3, 1), float(golden["freq/D"])
  height, width = images.shape[1:3]
  weight = adafreq.high_pass(height, width, deviation)
  for i, image in enumerate(images):
    level = adafreq.grey(jnp.asarray(image))
    np.testing.assert_allclose(level, golden["freq/gray"][i], atol=1e-5)
    filtered = adafreq.magnitude((adafreq.spectrum(level), weight))
    relative(filtered, golden["freq/highpass_magnitude"][i])
    wrong = np.abs(
      np.asarray(adafreq.eight_bits(adafreq.stretched(filtered))) - golden["freq/high_uint8"][i]
    )
    assert wrong.max() <= 1 and (wrong > 0).mean() <= 0.01
    smooth = adafreq.magnitude((adafreq.spectrum(level), 1 - weight))
    low = (smooth - smooth.min()) / (smooth.max() - smooth.min() + 1e-5)
    wrong = np.abs(np.asarray(adafreq.eight_bits(low)) - golden["freq/low_uint8"][i])
    assert wrong.max() <= 1 and (wrong > 0).mean() <= 0.01


def test_boxes_and_mixing_as_in_the_code(golden):
  images = golden["freq/image"].transpose(0, 2, 3, 1)
  height, width = images.shape[1:3]
  for i, image in enumerate(images):
    lam, centre = golden["freq/lam"][i], jnp.asarray(golden["freq/center_row_col"][i])
    for name, side in (("code", np.sqrt(1 - lam)), ("paper", np.sqrt(lam))):
      box = adafreq.mixing_box(height, width, float(side), centre)
      np.testing.assert_array_equal(box, golden[f"freq/box_{name}"][i])
    box = adafreq.Box(*jnp.asarray(golden["freq/box_code"][i]))
    level = adafreq.grey(jnp.asarray(image))
    high = adafreq.spectrum(jnp.asarray(golden["freq/high_uint8"][i], jnp.float32))
    put = adafreq.inside(box, height, width).astype(jnp.float32)
    got = adafreq.magnitude((adafreq.spectrum(level), put), (high, 1 - put))
    relative(got, golden["freq/mixed_magnitude"][i])
    view = adafreq.mixed(level, float(golden["freq/D"]), box, "code")
    np.testing.assert_allclose(view, golden["freq/high_image"][i][0], atol=2 / 255)


def vit(golden):
  """The model of the file and its parameters."""
  height, width, patch, stride, channels, depth, heads, ratio, *_ = map(int, golden["vit/config"])
  encoder = EncoderConfig(
    width=channels, num_layers=depth, heads=heads, hidden=ratio * channels, epsilon=1e-6
  )
  model = ViT(ViTConfig(encoder=encoder, image_size=(height, width), patch=patch, stride=stride))
  at = lambda name: jnp.asarray(golden[f"vit/params/{name}"])
  dense = lambda name: {"kernel": at(f"{name}.weight").T, "bias": at(f"{name}.bias")}
  norm = lambda name: {"scale": at(f"{name}.weight"), "bias": at(f"{name}.bias")}
  layers = {}
  for i in range(depth):
    block = f"blocks.{i}."
    parts = zip(
      jnp.split(at(f"{block}attn.qkv.weight"), 3), jnp.split(at(f"{block}attn.qkv.bias"), 3),
      strict=True,
    )  # fmt: skip
    attention = {
      name: {"kernel": kernel.T, "bias": bias}
      for name, (kernel, bias) in zip(("query", "key", "value"), parts, strict=True)
    }
    layers[f"layers_{i}"] = {
      "attention": attention | {"out": dense(f"{block}attn.proj")},
      "mlp": {"fc_1": dense(f"{block}mlp.fc1"), "fc_2": dense(f"{block}mlp.fc2")},
      "norm_1": norm(f"{block}norm1"),
      "norm_2": norm(f"{block}norm2"),
    }
  params = {
    "class_token": at("cls_token"),
    "position": at("pos_embed"),
    "patch_embedding": {
      "kernel": at("patch_embed.proj.weight").transpose(2, 3, 1, 0),
      "bias": at("patch_embed.proj.bias"),
    },
    "encoder": layers,
    "norm": norm("norm"),
  }
  return model, params


def test_two_branches(golden):
  model, params = vit(golden)
  image, high = (
    jnp.asarray(golden[f"vit/{name}"].transpose(0, 2, 3, 1)) for name in ("image", "high_image")
  )
  view = adafreq.original_view(model, params, image)
  np.testing.assert_allclose(view.tokens, golden["vit/tokens"], atol=1e-4)
  attention = golden["vit/last_attention"][:, :, 0, 1:].mean(1)
  np.testing.assert_allclose(view.scores, attention, atol=1e-5)
  share = int(golden["vit/config"][9]) / attention.shape[1]
  ranked = jnp.asarray(golden["vit/params/pos_embed_1"])
  for select, table in (("paper", None), ("code", ranked)):
    kept = adafreq.selected(view.scores, share, select)
    np.testing.assert_array_equal(kept, golden[f"vit/need_{select}"])
    got = adafreq.high_view(model, params, high, kept, table).tokens
    np.testing.assert_allclose(got, golden[f"vit/high_tokens_{select}"], atol=1e-4)
  at_code = adafreq.taken(view.tokens, kept)
  np.testing.assert_allclose(at_code, golden["vit/orig_tokens_at_need_code"], atol=1e-4)


def losses(golden, score_o, feat_o, feat_h, tokens_h, weights, first):
  labels = jnp.asarray(golden["loss/labels"])
  return adafreq.total(
    adafreq.Terms(
      *adafreq.branch_terms(score_o, feat_o, labels),
      *adafreq.branch_terms(jnp.asarray(golden["loss/score_h"]), feat_h, labels),
      adafreq.equilibrium(jnp.asarray(golden["loss/tokens_o"])[:, first:], tokens_h[:, first:]),
    ),
    weights,
  )


def test_losses_and_gradients(golden):
  labels = jnp.asarray(golden["loss/labels"])
  for branch in "oh":
    score, feature = (jnp.asarray(golden[f"loss/{kind}_{branch}"]) for kind in ("score", "feat"))
    identity, hard = adafreq.branch_terms(score, feature, labels)
    np.testing.assert_allclose(identity, golden[f"loss/ce_{branch}"], rtol=1e-5)
    np.testing.assert_allclose(hard, golden[f"loss/soft_triplet_{branch}"], rtol=1e-5)
  pairs = adafreq.hardest(jnp.asarray(golden["loss/feat_o"]), labels)
  np.testing.assert_allclose(pairs.positive, golden["loss/dist_ap_o"], rtol=1e-5)
  np.testing.assert_allclose(pairs.negative, golden["loss/dist_an_o"], rtol=1e-5)
  margin = adafreq.triplet(pairs, margin=0.3)
  np.testing.assert_allclose(margin, golden["loss/margin_triplet_o_0.3"], rtol=1e-5)
  tokens = [jnp.asarray(golden[f"loss/tokens_{branch}"]) for branch in "oh"]
  whole, code = adafreq.equilibrium(*tokens), adafreq.equilibrium(*(x[:, 1:] for x in tokens))
  np.testing.assert_allclose(whole, golden["loss/equilibrium_all_tokens"], rtol=1e-5)
  np.testing.assert_allclose(code, golden["loss/equilibrium_code"], rtol=1e-5)
  names = "score_o", "feat_o", "feat_h", "tokens_h"
  arrays = [jnp.asarray(golden[f"loss/{name}"]) for name in names]
  paper = losses(golden, *arrays, adafreq.PAPER, 0)
  np.testing.assert_allclose(paper, golden["loss/total_paper"], rtol=1e-5)
  total = lambda *arrays: losses(golden, *arrays, adafreq.CODE, 1)
  value, gradients = jax.value_and_grad(total, (0, 1, 2, 3))(*arrays)
  np.testing.assert_allclose(value, golden["loss/total_code"], rtol=1e-5)
  for name, gradient in zip(names, gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"loss/grad_{name}"], rtol=1e-4, atol=1e-5)


def test_neck(golden):
  x, scale = jnp.asarray(golden["bnneck/x"]), jnp.asarray(golden["bnneck/weight"])
  fresh = adafreq.Moments(jnp.zeros_like(scale), jnp.ones_like(scale))
  out, running = adafreq.bnneck(x, scale, fresh, train=True)
  np.testing.assert_allclose(out, golden["bnneck/train_out"], atol=1e-5)
  np.testing.assert_allclose(running.mean, golden["bnneck/running_mean"], atol=1e-5)
  np.testing.assert_allclose(running.variance, golden["bnneck/running_var"], atol=1e-5)
  out, same = adafreq.bnneck(x, scale, running, train=False)
  np.testing.assert_allclose(out, golden["bnneck/eval_out"], atol=1e-5)
  assert same is running


@pytest.mark.parametrize("block", [(1, 1), (7, 11), (256, 4096)])
def test_retrieval(golden, block):
  features = jnp.asarray(golden["eval/features"])
  labels, camera = jnp.asarray(golden["eval/pid"]), jnp.asarray(golden["eval/cam"])
  place, most = jnp.arange(len(labels)), int(np.bincount(golden["eval/pid"]).max())

  def check(name, queries, gallery, found):
    got = retrieval.summary(retrieval.ranks(queries, gallery, found, block=block), 20)
    np.testing.assert_allclose(got.cmc, golden[f"eval/cmc20_{name}"], atol=1e-6)
    np.testing.assert_allclose(got.mean_ap, golden[f"eval/mAP_{name}"], atol=1e-6)
    if f"eval/mINP_{name}" in golden:
      np.testing.assert_allclose(got.mean_inp, golden[f"eval/mINP_{name}"], atol=1e-6)

  check("self", features, features, retrieval.matches(labels, labels, most, itself=place))
  excluded = retrieval.matches(labels, labels, most, groups=(camera, camera))
  check("camexcl", features, features, excluded)
  cut = int(golden["eval/split_query_count"])
  split = retrieval.matches(labels[:cut], labels[cut:], most)
  check("split", features[:cut], features[cut:], split)


def test_learning_rate(golden):
  base, epochs, warmup = golden["lr/base_total_warmup"]
  for group, wanted in zip((1, 2), golden["lr/values"].T, strict=True):
    got = adafreq.learning_rate(
      np.arange(len(wanted)), base, int(epochs), warmup=int(warmup), group=group
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-9)


def test_positions_of_another_size(golden):
  old, new = golden["posresize/in"], tuple(map(int, golden["posresize/new_hw"]))
  got = resized_position(jnp.asarray(old), new)
  np.testing.assert_allclose(got, golden["posresize/out"], atol=1e-5)
