"""Properties of the path's kinetics and of Chain-of-Embedding, and what leaves the model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods import cot_kinetics as method
from jaxmethods.models import reading
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig
from jaxmethods.models.probe import masked_mean
from jaxmethods.stats import confidence

L, D = 5, 6


@jax.jit
def everything(z):
  """Path, all energies at gamma 0, 0.8 and 1, and CoE of z (..., L + 1, D)."""
  path = method.path(z)
  energies = {
    (form, gamma): method.energy(path, gamma, form)
    for form in method.FORMS
    for gamma in (0.0, 0.8, 1.0)
  }
  return path, energies, method.chain_of_embedding(z)


def wander(seed, *batch):
  return np.cumsum(np.random.default_rng(seed).normal(size=(*batch, L + 1, D)), -2).astype("f4")


def staircase(directions):
  """The path of unit steps along these axes."""
  return np.cumsum(np.concatenate([np.ones((1, D)), np.eye(D)[directions]]), 0).astype("f4")


def test_a_straight_path():
  z = np.arange(L + 1)[:, None] * np.linspace(1, 2, D) + 3
  path, energies, chain = everything(z.astype("f4"))
  np.testing.assert_allclose(path.momentum, 1 / L, rtol=1e-5)
  np.testing.assert_allclose(path.turning, 0, atol=1e-5)
  np.testing.assert_allclose(path.accel_norm, 0, atol=1e-5)
  for gamma in (0.0, 0.8, 1.0):
    for form in ("turning", "turning_sq"):
      np.testing.assert_allclose(energies[form, gamma], 1 / L, rtol=1e-4)
    for form in ("quadratic", "quadratic_plus"):
      np.testing.assert_allclose(energies[form, gamma], 1 / (2 * L**2), rtol=1e-4)
  np.testing.assert_allclose(chain.magnitude, 1 / L, rtol=1e-5)


def test_turns_of_known_angle():
  stairs = everything(staircase([0, 1] * (L // 2) + [0] * (L % 2)))[0]
  np.testing.assert_allclose(stairs.turning, np.pi / 2, rtol=1e-5)
  back = np.where(np.arange(L + 1)[:, None] % 2, 1.0, 0.0) * np.ones(D)
  np.testing.assert_allclose(everything(back.astype("f4"))[0].turning, np.pi, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_invariances(seed):
  rng = np.random.default_rng(seed)
  z = wander(seed)
  rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
  _, energies, chain = everything(z)
  for moved in (z @ rotation, z + rng.normal(size=D), 7.5 * z):
    for name, energy in everything(moved.astype("f4"))[1].items():
      np.testing.assert_allclose(energy, energies[name], rtol=2e-3, atol=2e-5)
  shifted = everything((z + 5).astype("f4"))[2]
  assert abs(shifted.real - chain.real) > 1e-3  # its angles look at the states, not at the steps


def test_energy_is_linear_in_gamma_and_gamma_zero_is_the_momentum():
  path, energies, _ = everything(wander(3, 4))
  terms = jax.tree.map(lambda x: x.mean(-1), method.terms(path))
  slopes = {
    "turning": -terms.turning,
    "turning_sq": -terms.turning_sq,
    "quadratic": -terms.acceleration,
    "quadratic_plus": terms.acceleration,
  }
  for form, slope in slopes.items():
    for gamma in (0.8, 1.0):
      line = energies[form, 0.0] + gamma * slope
      np.testing.assert_allclose(energies[form, gamma], line, rtol=1e-5, atol=1e-6)
  for form in ("turning", "turning_sq"):
    np.testing.assert_allclose(energies[form, 0.0], path.momentum[:, 1:].mean(-1), rtol=1e-6)
  assert (path.momentum.mean(-1) >= 1 / L).all()  # triangle inequality
  one, *_ = everything(wander(3, 4)[2])
  np.testing.assert_allclose(one.turning, path.turning[2], rtol=1e-5)


def broken_paths():
  """A path that comes back to its start, one that rests, one that never moves."""
  loop = staircase([0, 1, 2, 3, 4])
  loop[-1] = loop[0]
  rest = wander(1)
  rest[3] = rest[2]
  return np.stack([loop, rest, np.ones((L + 1, D), "f4")])


def test_degenerate_paths_are_finite_and_flagged():
  z = broken_paths()
  path, energies, chain = everything(z)
  assert not path.ok.any()
  assert everything(wander(0))[0].ok
  for leaf in jax.tree.leaves((path, energies, chain)):
    assert np.isfinite(leaf).all()
  gradient = jax.jit(
    jax.grad(
      lambda z: method.energy(method.path(z)).sum() + method.chain_of_embedding(z).real.sum()
    )
  )
  straight = np.arange(L + 1)[:, None] * np.ones((L + 1, D)) + 1
  for case in (*z[1:], straight):
    assert np.isfinite(gradient(case.astype("f4"))).all()


def test_one_layer_has_no_turn():
  with pytest.raises(ValueError, match="two layers"):
    method.path(jnp.zeros((2, D)))
  with pytest.raises(ValueError, match="turnin"):
    method.energy(method.path(jnp.asarray(wander(0))), form="turnin")


def test_pooling_ignores_what_is_masked_and_the_order():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, L + 1, 7, D)).astype("f4")
  mask = np.array([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], bool)  # one token is enough
  z = method.pool(hidden, jnp.asarray(mask))
  np.testing.assert_allclose(z[0], hidden[0][:, mask[0]].mean(1), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(z[1], hidden[1][:, 3], rtol=1e-6)
  holes = np.where(mask[:, None, :, None], hidden, np.nan)
  np.testing.assert_array_equal(method.pool(holes, jnp.asarray(mask)), z)
  order = rng.permutation(7)
  shuffled = method.pool(hidden[:, :, order], jnp.asarray(mask[:, order]))
  np.testing.assert_allclose(shuffled, z, rtol=1e-5, atol=1e-6)
  single = method.pool(hidden[:1], jnp.asarray(mask[:1]))
  np.testing.assert_allclose(single, z[:1], rtol=1e-6)


def test_one_token_is_its_own_mean():
  """With one reasoning token both ways of pooling are the same path."""
  z = wander(5, 3)
  paths = functools.reduce(method.follow_tokens, jnp.moveaxis(z[:, :, None], 1, 0), None)
  terms = method.token_terms(paths, jnp.ones((3, 1)))
  for form in method.FORMS:
    want = method.energy(method.path(z), 0.8, form)
    np.testing.assert_allclose(method.energy_of(terms, 0.8, form), want, rtol=1e-5, atol=1e-6)


def test_acceleration_of_a_linear_flow():
  matrix, h = np.random.default_rng(0).normal(size=(D, D)), np.arange(D) - 1.5
  got = method.flow_acceleration(lambda x: matrix @ x, jnp.asarray(h))
  np.testing.assert_allclose(got, matrix @ matrix @ h, rtol=1e-4)


# --- what leaves the model ------------------------------------------------------------------------

CONFIG = CausalLMConfig(
  vocab_size=29, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24,
  init_std=0.6,
)  # fmt: skip
B, PROMPT, NEW = 2, 4, 9


@pytest.fixture(scope="module")
def text():
  ids = np.random.default_rng(0).integers(1, 29, (B, PROMPT + NEW))
  mask = np.ones((B, PROMPT + NEW), bool)
  mask[1, :2] = mask[1, -3:] = False
  segments = np.stack([mask[:, PROMPT:], mask[:, PROMPT:] & (np.arange(NEW) < 4)], 1)
  return reading.Text(jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(segments))


@pytest.fixture(scope="module")
def params():
  return jax.jit(CausalLM(CONFIG, scan_layers=True).init)(
    jax.random.key(0), jnp.zeros((1, 1), int)
  )["params"]


def read(params, text, scan=True, **options):
  model = CausalLM(CONFIG, scan_layers=scan)
  return reading.read(
    model, {"params": params}, text, confidence.token_statistics, fold=method.follow_tokens,
    at_once=4 * B, **options,
  )  # fmt: skip


def unrolled(params):
  layers = {
    f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
    for i in range(CONFIG.num_layers)
  }
  return {name: tree for name, tree in params.items() if name != "layers"} | layers


def test_reading_is_the_plain_forward_pass(params, text):
  """States and logits of the columns before every token, from a pass that keeps everything."""
  kept = {}

  def keep(x):
    kept.setdefault("states", []).append(x)
    return x.mean(1)

  model = CausalLM(CONFIG)
  out = model.apply(
    {"params": unrolled(params)}, text.ids, mask=text.mask, probe=reading.Probe(states=keep)
  )
  hidden = jnp.stack(kept["states"][: CONFIG.num_layers + 1], 1)
  got = jax.jit(read)(params, text)
  before = slice(PROMPT - 1, -1)
  for s in range(2):
    z = method.pool(hidden[:, :, before], text.segments[:, s])
    np.testing.assert_allclose(got.states[:, s], z, rtol=2e-4, atol=2e-4)
  paths = functools.reduce(method.follow_tokens, jnp.moveaxis(hidden[:, :, before], 1, 0), None)
  both = (method.token_terms(found, text.segments) for found in (got.folded, paths))
  chex.assert_trees_all_close(*both, rtol=1e-3, atol=1e-3)
  want = confidence.token_statistics(out.logits[:, before], text.ids[:, PROMPT:])
  real = np.asarray(text.mask[:, PROMPT:])
  for a, b in zip(got.tokens, want, strict=True):
    np.testing.assert_allclose(a[real], b[real], rtol=1e-3, atol=1e-3)


def test_padding_does_not_matter(params, text):
  wider = reading.Text(
    jnp.pad(text.ids, ((0, 0), (3, 5)), constant_values=7),
    jnp.pad(text.mask, ((0, 0), (3, 5))),
    jnp.pad(text.segments, ((0, 0), (0, 0), (0, 5))),
  )
  plain, padded = jax.jit(read)(params, text), jax.jit(read)(params, wider)
  np.testing.assert_allclose(padded.states, plain.states, rtol=1e-4, atol=1e-4)


def test_the_official_first_token(params, text):
  states = jnp.broadcast_to(jnp.arange(PROMPT + NEW)[:, None], (B, PROMPT + NEW, 1))
  columns = lambda **options: np.asarray(reading.predicting(text, states, **options))[..., 0]
  np.testing.assert_array_equal(columns(), [range(PROMPT - 1, PROMPT + NEW - 1)] * B)
  official = columns(official_first_token=True)
  np.testing.assert_array_equal(official[:, 0], [0, 2])  # the second prompt is padded by two
  np.testing.assert_array_equal(official[:, 1:], columns()[:, 1:])


def subjaxprs(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in equation.params.values():
      for inner in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(inner, jax.extend.core.ClosedJaxpr):
          yield from subjaxprs(inner.jaxpr)
        elif isinstance(inner, jax.extend.core.Jaxpr):
          yield from subjaxprs(inner)


def test_no_states_are_stacked_and_nothing_is_differentiated(params, text):
  def score(params, text):
    got = read(params, text)
    path = method.path(got.states)
    return method.energy(path), method.token_terms(got.folded, text.segments)

  jaxpr = jax.make_jaxpr(score)(params, text).jaxpr
  primitives, shapes = set(), set()
  for inner in subjaxprs(jaxpr):
    for equation in inner.eqns:
      primitives.add(equation.primitive.name)
      shapes |= {(equation.primitive.name, tuple(v.aval.shape)) for v in equation.outvars}
  assert "scan" in primitives
  # A backward pass, or a nested derivative, would leave one of these.
  assert not {name for name in primitives if "transpose_" in name or "jvp" in name or "vjp" in name} - {
    "custom_vjp_call", "custom_jvp_call",
  }  # fmt: skip
  total = PROMPT + NEW
  for name, shape in shapes:
    assert shape[-4:] != (CONFIG.num_layers, B, total, CONFIG.width), name
    assert shape[-4:] != (CONFIG.num_layers + 1, B, total, CONFIG.width), name
  out = jax.eval_shape(read, params, text)
  assert out.states.shape == (B, 2, CONFIG.num_layers + 1, CONFIG.width)


def test_memory_does_not_grow_with_the_layers(params):
  """Temporaries of the pass: the summaries (layers, batch, width) more, and nothing with tokens."""

  def temporaries(layers, tokens):
    config = CausalLMConfig(**{**CONFIG.__dict__, "num_layers": layers})
    model = CausalLM(config, scan_layers=True)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 1), int)), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, tokens), bool)
    segments = jax.ShapeDtypeStruct((1, 1, tokens - PROMPT), bool)

    def run(variables, text):
      return reading.read(model, variables, text, confidence.token_statistics).states

    lowered = jax.jit(run).lower(shapes, reading.Text(ids, mask, segments))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  tokens = 64
  grown = temporaries(24, tokens) - temporaries(12, tokens)
  assert grown < 12 * tokens * CONFIG.width * 4 / 2  # stacked states would be twice this


def test_masks_without_tokens_pool_to_zero():
  mean = masked_mean(jnp.zeros((1, 3)))
  np.testing.assert_array_equal(mean(jnp.full((1, 3, 2), jnp.nan)), 0)


def test_shapes_are_checked_at_the_door():
  z = jnp.asarray(wander(0, 2))
  with pytest.raises(ValueError, match="z: expected"):
    method.path(jnp.zeros(D))
  with pytest.raises(ValueError, match="at least 2 states, got 1"):
    method.chain_of_embedding(z[:, :1])
  with pytest.raises(ValueError, match=r"mask: expected shape \(B=2, T=3\), got \(2, 4\)"):
    method.pool(jnp.zeros((2, L + 1, 3, D)), jnp.ones((2, 4)))
  terms = method.terms(method.path(z))
  with pytest.raises(ValueError, match="turning: expected"):
    method.energy_of(terms._replace(turning=terms.turning[:1]))
  paths = method.follow_tokens(None, jnp.zeros((2, 3, D)))
  with pytest.raises(ValueError, match="x: expected"):
    method.follow_tokens(paths, jnp.zeros((2, 4, D)))
  with pytest.raises(ValueError, match="mask: expected"):
    method.token_terms(paths, jnp.ones((2, 4)))
  with pytest.raises(ValueError, match="update: expected shape"):
    method.flow_acceleration(lambda h: h[1:], jnp.ones(3))
