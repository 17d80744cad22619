"""Graph-free distillation: pseudo-graphs, students and rivals put together.

The heavy half of `experiments.acgkd`. The first steps of a run optimise all pseudo-graphs together
(`gen_chunk` iterations a step), each later one is an epoch of distillation, in one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax

from jaxmethods.data import gfkd
from jaxmethods.errors import InputError
from jaxmethods.experiments.acgkd import figures as pseudo_graph_figures
from jaxmethods.experiments.acgkd import teachers as graph_teachers
from jaxmethods.methods import acgkd as method
from jaxmethods.models.graph_classifier import (
  Classifier,
  GraphEncoder,
  Head,
  batch_norm_gap,
  init_head,
)
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment

if TYPE_CHECKING:
  from jaxmethods.experiments.acgkd.config import Config

# Up to so many node slots a dense adjacency is the faster form.
DENSE_NODES = 160
MUTAG_NODES = (10, 29)  # GFKD code
GENERATED = ("acgkd", "gfkd", "deepinversion")
MADE_UP = (*GENERATED, "random")


class Best(NamedTuple):
  """The iterate of the lowest objective: structure and features of the same one."""

  loss: jax.Array
  log_odds: jax.Array
  features: jax.Array
  terms: dict[str, jax.Array]


class Targets(NamedTuple):
  """What the teacher says of graphs: logits (P, C) and pooled features (P, d_t)."""

  logits: jax.Array
  pooled: jax.Array


class Pseudo(NamedTuple):
  """The pseudo-graphs.

  Attributes:
    num_nodes, labels: (P,) int32.
    pairs: candidates.
    log_odds: (P, M), of the candidates.
    features: phi (P, N, F).
    moments: of Adam, for each of the two.
    best: what is kept.
    targets: the teacher's answers on the final graphs.
    gap: () distance of the final graphs from the teacher's batch-norm statistics.
  """

  num_nodes: jax.Array
  labels: jax.Array
  pairs: method.Pairs
  log_odds: jax.Array
  features: jax.Array
  moments: tuple[Any, Any]
  best: Best
  targets: Targets
  gap: jax.Array


class Student(NamedTuple):
  """What is distilled: weights (with "head" if the classifier is its own) and the temperature's rho."""

  params: dict[str, Any]
  batch_stats: Any
  moments: Any
  rho: jax.Array


class State(NamedTuple):
  """Everything a checkpoint needs."""

  key: jax.Array
  pseudo: Pseudo | None
  student: Student


class Work(NamedTuple):
  """A step's input.

  Attributes:
    number: of the step.
    learning_rate: of the student's first epoch; no constant, so that one program serves any.
    teacher: weights.
    real: graphs that are given with the teacher's answers, stacked: its training graphs (the upper
      bound), or those of the published code.
  """

  number: jax.Array
  learning_rate: jax.Array
  teacher: Classifier
  real: tuple[jraph.GraphsTuple, Targets] | None


class Test(NamedTuple):
  """What `evaluate` reads.

  Attributes:
    batches: test graphs, stacked batches.
    validation: the graphs that the teacher was trained on, for choosing settings; no student of
      pseudo-graphs sees them.
    teacher: weights.
    accuracy: () of the teacher on the test graphs.
  """

  batches: jraph.GraphsTuple
  validation: jraph.GraphsTuple
  teacher: Classifier
  accuracy: jax.Array


class Sizes(NamedTuple):
  """Static sizes of the pseudo-graphs: how many, n from `low` to `high`, slots, features, classes."""

  graphs: int
  low: int
  high: int
  features: int
  classes: int
  one_hot: bool


# --- pseudo-graphs --------------------------------------------------------------------------------


def choose_sizes(config: Config, material: graph_teachers.Material) -> Sizes:
  """Sizes of the pseudo-graphs from the config and what is known of the real graphs."""
  data = material.data
  n_node = np.asarray(data.graphs.n_node)[material.train]
  low, high = config.min_nodes, config.max_nodes
  if not low:
    low, high = MUTAG_NODES
    if config.data not in (gfkd.NAME, "embedded:MUTAG", "tu:MUTAG"):
      low, high = (max(2, int(np.quantile(n_node, q))) for q in (0.1, 0.9))
  if config.xi_mode == "nodes":
    low, high = (max(2, round(config.xi * n)) for n in (low, high))
  x = data.graphs.nodes
  one_hot = bool(((x == 0) | (x == 1)).all() and (x.sum(1) == 1).all())
  graphs = config.pseudo_graphs or len(material.train)
  return Sizes(graphs, low, high, x.shape[1], data.num_classes, one_hot)


def make_generator(config: Config, sizes: Sizes, encoder: GraphEncoder):
  """Returns (start, generate, final, as_batch); see each."""
  edge_form = config.form == "edges" or (config.form == "auto" and sizes.high > DENSE_NODES)
  adam = optax.scale_by_adam()
  xi = config.xi if config.xi_mode == "pairs" else 1.0
  rounded = config.algorithm == "acgkd" and config.relaxation == "straight_through"

  def soft(phi: jax.Array) -> jax.Array:
    return jax.nn.softmax(phi) if sizes.one_hot else phi

  def seen(phi: jax.Array) -> jax.Array:
    """Features as the teacher sees them during generation."""
    if rounded and sizes.one_hot:
      return method.straight_through(soft(phi), method.one_hot_features(phi))
    return soft(phi)

  def as_batch(pseudo: Pseudo, weights: jax.Array, features: jax.Array) -> jraph.GraphsTuple:
    return method.assemble(
      pseudo.pairs, weights, features, pseudo.num_nodes, directed=config.directed
    )

  def ask(teacher: Classifier, pseudo: Pseudo, weights, features):
    """The teacher's logits, pooled features and batch-norm gap."""
    batch = as_batch(pseudo, weights, features)
    pooled, gap = batch_norm_gap(encoder, teacher.variables, batch)
    return teacher.head(pooled), pooled, gap

  def final(pseudo: Pseudo) -> tuple[jax.Array, jax.Array]:
    """Edges of 0 and 1 (P, M) and node features (P, N, F) of the graphs that are kept."""
    features = soft(pseudo.best.features)
    if sizes.one_hot and config.hard_features:
      features = method.one_hot_features(pseudo.best.features)
    return method.harden(pseudo.best.log_odds), features

  def answered(teacher: Classifier, pseudo: Pseudo) -> Pseudo:
    logits, pooled, gap = ask(teacher, pseudo, *final(pseudo))
    return pseudo._replace(targets=Targets(logits, pooled), gap=gap)

  def start(key: jax.Array, teacher: Classifier) -> Pseudo:
    """Random graphs: sizes and classes uniform, edge probabilities uniform, features normal."""
    keys = jax.random.split(key, 5)
    num_nodes = jax.random.randint(keys[0], (sizes.graphs,), sizes.low, sizes.high + 1)
    labels = jax.random.randint(keys[1], (sizes.graphs,), 0, sizes.classes)
    pairs = method.draw_candidates(
      keys[2], num_nodes, sizes.high, xi=xi, directed=config.directed, edge_form=edge_form
    )
    probability = jax.random.uniform(keys[3], pairs.source.shape, minval=1e-6, maxval=1 - 1e-6)
    log_odds = jax.scipy.special.logit(probability)
    features = jax.random.normal(keys[4], (sizes.graphs, sizes.high, sizes.features))
    terms = {name: jnp.zeros(()) for name in ("cross_entropy", "batch_norm", "entropy")}
    best = Best(jnp.float32(jnp.inf), log_odds, features, terms)
    moments = adam.init(log_odds), adam.init(features)
    width = teacher.head.kernel.shape[0]
    targets = Targets(jnp.zeros((sizes.graphs, sizes.classes)), jnp.zeros((sizes.graphs, width)))
    pseudo = Pseudo(
      num_nodes, labels, pairs, log_odds, features, moments, best, targets, jnp.zeros(())
    )
    return answered(teacher, pseudo)

  def objective(teacher: Classifier, pseudo: Pseudo, weights, phi):
    logits, _, gap = ask(teacher, pseudo, weights, seen(phi))
    entropy = jnp.zeros(())
    if sizes.one_hot:
      mask = jnp.arange(sizes.high) < pseudo.num_nodes[:, None]
      entropy = method.feature_entropy(phi, mask)
    terms = method.Terms(method.cross_entropy(logits, pseudo.labels), gap, entropy)
    total = terms.total(config.bn_weight, config.entropy_weight)
    return total, terms._replace(cross_entropy=terms.cross_entropy.mean())._asdict()

  def iterate(teacher: Classifier, pseudo: Pseudo, i: jax.Array, key: jax.Array) -> Pseudo:
    """One iteration; the better of this iterate and the best so far is kept."""
    theta, phi = pseudo.log_odds, pseudo.features
    uniform = jax.random.uniform(key, theta.shape)
    decay = 0.1 ** (i // config.lr_decay_every).astype(jnp.float32)

    def moved(x, gradient, moments, rate):
      updates, moments = adam.update(gradient, moments)
      return x - rate * decay * updates, moments

    if config.algorithm == "acgkd":
      share = i / max(1, config.gen_iters - 1)
      heat = config.concrete_temperature * (
        (config.concrete_end / config.concrete_temperature) ** share
      )

      def relaxed(theta, phi):
        s = method.concrete(theta, uniform, heat, config.noise)
        if rounded:
          s = method.straight_through(s, jnp.round(s))
        total, terms = objective(teacher, pseudo, s, phi)
        if config.xi_mode == "penalty":
          total += config.xi * s.mean(where=pseudo.pairs.mask)
        return total, terms

      (value, terms), (d_theta, d_phi) = jax.value_and_grad(relaxed, (0, 1), has_aux=True)(
        theta, phi
      )
      new_phi, phi_moments = moved(phi, d_phi, pseudo.moments[1], config.feature_lr)
    else:
      fixed = lambda phi: objective(teacher, pseudo, method.harden(theta), phi)
      (value, terms), d_phi = jax.value_and_grad(fixed, has_aux=True)(phi)
      new_phi, phi_moments = moved(phi, d_phi, pseudo.moments[1], config.feature_lr)
      if config.algorithm == "gfkd":

        def losses(edges):
          logits, _, gap = ask(teacher, pseudo, edges, soft(new_phi))
          return method.cross_entropy(logits, pseudo.labels), gap

        d_theta = method.antithetic_gradient(theta, uniform, losses, config.bn_weight)
    theta_moments = pseudo.moments[0]
    new_theta = theta
    if config.algorithm != "deepinversion":
      new_theta, theta_moments = moved(theta, d_theta, theta_moments, config.structure_lr)
    better = value < pseudo.best.loss
    best = jax.tree.map(
      lambda new, old: jnp.where(better, new, old), Best(value, theta, phi, terms), pseudo.best
    )
    return pseudo._replace(
      log_odds=new_theta, features=new_phi, moments=(theta_moments, phi_moments), best=best
    )

  def generate(teacher: Classifier, pseudo: Pseudo, first: jax.Array, key: jax.Array) -> Pseudo:
    """`gen_chunk` iterations from number `first` on."""

    def body(j, pseudo):
      return iterate(teacher, pseudo, first + j, jax.random.fold_in(key, first + j))

    return answered(teacher, jax.lax.fori_loop(0, config.gen_chunk, body, pseudo))

  return start, generate, final, as_batch


# --- students -------------------------------------------------------------------------------------


class Lesson(NamedTuple):
  """One mini-batch of distillation; `mask` (B,) marks the graphs that count."""

  batch: jraph.GraphsTuple
  targets: Targets
  mask: jax.Array


def make_student(config: Config, encoder: GraphEncoder, num_classes: int):
  """Returns (start, learn, logits) of the student; see each."""
  adam = optax.scale_by_adam()
  own = config.classifier == "own"
  bounds = config.tau_min, config.tau_max

  def head_of(params: Any, teacher: Classifier) -> Head:
    return Head(**params["head"]) if own else jax.lax.stop_gradient(teacher.head)

  def start(key: jax.Array, batch: jraph.GraphsTuple) -> Student:
    keys = jax.random.split(key)
    variables = encoder.init(keys[0], batch)
    params = {"encoder": variables["params"]}
    if own:
      params["head"] = init_head(keys[1], encoder.width, num_classes)._asdict()
    rho = jnp.zeros(())
    if config.temperature == "adversarial":
      rho = jnp.float32(method.inverse_temperature(config.tau, *bounds))
    return Student(params, variables["batch_stats"], adam.init(params), rho)

  def tau_of(rho: jax.Array) -> jax.Array:
    if config.temperature == "fixed":
      return jnp.float32(config.tau)
    return method.adversarial_temperature(rho, *bounds)

  def learn(
    student: Student,
    teacher: Classifier,
    lesson: Callable[[jax.Array], Lesson],
    count: jax.Array | int,
    epoch: jax.Array,
    learning_rate: jax.Array,
    key: jax.Array,
  ) -> tuple[Student, jax.Array]:
    """One epoch over the lessons 0..count-1; returns the mean loss too."""
    rate = learning_rate * (1 - epoch / config.steps)
    ascent = method.reversal(epoch, config.tau_epochs)

    def loss(params, rho, batch_stats, lesson, key):
      logits, pooled, batch_stats = graph_teachers.train_logits(
        encoder, params["encoder"], batch_stats, head_of(params, teacher), lesson.batch,
        config.dropout, key,
      )  # fmt: skip
      value = method.distillation_loss(logits, lesson.targets.logits, tau_of(rho), lesson.mask)
      if config.feature_weight:
        distance = jnp.square(pooled - lesson.targets.pooled).mean(-1)
        value += config.feature_weight * distance.mean(where=lesson.mask)
      return value, batch_stats

    def step(i, carry):
      (params, batch_stats, moments, rho), total = carry
      (value, batch_stats), (d_params, d_rho) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        params, rho, batch_stats, lesson(i), jax.random.fold_in(key, i)
      )
      updates, moments = adam.update(d_params, moments)
      params = jax.tree.map(lambda w, u: w - rate * u, params, updates)
      rho = method.ascend(rho, d_rho, config.tau_lr, ascent)
      return Student(params, batch_stats, moments, rho), total + value

    student, total = jax.lax.fori_loop(0, count, step, (student, jnp.zeros(())))
    return student, total / count

  def logits(student: Student, teacher: Classifier, batch: jraph.GraphsTuple) -> jax.Array:
    """In evaluation mode."""
    variables = {"params": student.params["encoder"], "batch_stats": student.batch_stats}
    pooled: Any = encoder.apply(variables, batch)
    return head_of(student.params, teacher)(pooled)

  return start, learn, logits, tau_of


# --- the experiment -------------------------------------------------------------------------------


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Args:
    config: of `experiments.acgkd`.
    mesh: not supported; a run fits one device.

  Raises:
    InputError: data or a teacher that are missing or do not fit.
  """
  if mesh is not None:
    raise InputError("--mesh: acgkd runs on one device")
  material = graph_teachers.load(config)
  data, teacher = material.data, material.teacher
  sizes = choose_sizes(config, material)
  made_up = config.algorithm in MADE_UP
  gen_steps = config.gen_iters // config.gen_chunk if config.algorithm in GENERATED else 0
  # The teacher sees sparse batches of undirected graphs only, unless the pseudo-graphs are directed.
  teacher_encoder = material.encoder.clone(symmetric=not config.directed)
  start, generate, final, as_batch = make_generator(config, sizes, teacher_encoder)
  encoder = GraphEncoder(
    config.student_kind,
    config.student_layers,
    config.student_width,
    projection=teacher.head.kernel.shape[0] if config.classifier == "teacher" else 0,
    symmetric=not config.directed,
  )
  begin, learn, student_logits, tau_of = make_student(config, encoder, sizes.classes)

  tests = jax.device_put(graph_teachers.real_batches(data, material.test, 128))
  validation = jax.device_put(graph_teachers.real_batches(data, material.train, 128))
  ask = compiler.jit(lambda teacher, batches: _answers(teacher_encoder, teacher, batches))
  test_answers = ask(teacher, tests)
  test = Test(tests, validation, teacher, _accuracy(test_answers.logits, tests))
  real = None
  if config.algorithm in ("real", "published"):
    given, ids = data, material.train
    if config.algorithm == "published":
      given = gfkd.load().pseudo
      ids = np.arange(len(given.labels))
    lessons = jax.device_put(graph_teachers.real_batches(given, ids, config.batch_size))
    real = lessons, ask(teacher, lessons)

  def init(key: jax.Array) -> State:
    keys = jax.random.split(key)
    pseudo = compiler.jit(start)(keys[0], teacher) if made_up else None
    student = compiler.jit(begin)(keys[1], jax.tree.map(lambda x: x[0], tests))
    return State(key, pseudo, student)

  def batches(step: int) -> Iterator[Work]:
    rate = jnp.float32(config.learning_rate)
    while True:
      yield Work(jnp.int32(step), rate, teacher, real)
      step += 1

  def pseudo_lessons(pseudo: Pseudo, epoch: jax.Array, key: jax.Array):
    edges, features = final(pseudo)
    order, available = jnp.arange(sizes.graphs), jnp.int32(sizes.graphs)
    if config.curriculum != "off":
      complexity = method.edge_complexity(edges, pseudo.pairs.mask)
      if config.curriculum == "teacher_loss":
        complexity = method.cross_entropy(pseudo.targets.logits, pseudo.labels)
      order = method.easy_to_hard(complexity)
      grow = config.curriculum_grow * config.steps
      available = method.curriculum_size(epoch, sizes.graphs, config.curriculum_start, grow)
    place = jnp.arange(sizes.graphs)
    shuffle = jnp.where(place < available, jax.random.uniform(key, place.shape), 2.0)
    drawn = jnp.pad(order[jnp.argsort(shuffle)], (0, -sizes.graphs % config.batch_size))

    def lesson(i: jax.Array) -> Lesson:
      at = i * config.batch_size + jnp.arange(config.batch_size)
      ids, mask = drawn[at], at < available
      chosen = pseudo._replace(
        num_nodes=jnp.where(mask, pseudo.num_nodes[ids], 0),
        pairs=jax.tree.map(lambda x: x[ids], pseudo.pairs),
      )
      targets = jax.tree.map(lambda x: x[ids], pseudo.targets)
      return Lesson(as_batch(chosen, edges[ids], features[ids]), targets, mask)

    return lesson, -(-available // config.batch_size), available

  def real_lessons(work: Work, key: jax.Array):
    assert work.real is not None
    graphs, targets = work.real
    count = graphs.n_node.shape[0]
    order = jax.random.permutation(key, count)

    def lesson(i: jax.Array) -> Lesson:
      pick = lambda x: x[order[i]]
      batch = jax.tree.map(pick, graphs)
      return Lesson(batch, jax.tree.map(pick, targets), batch.globals["mask"])

    return lesson, count, graphs.globals["mask"].sum()

  def distil(state: State, work: Work) -> tuple[State, jax.Array, jax.Array]:
    epoch = work.number - gen_steps
    order_key, drop_key = jax.random.split(jax.random.fold_in(state.key, work.number))
    if state.pseudo is None:
      lesson, count, seen = real_lessons(work, order_key)
    else:
      lesson, count, seen = pseudo_lessons(state.pseudo, epoch, order_key)
    student, loss = learn(
      state.student, work.teacher, lesson, count, epoch, work.learning_rate, drop_key
    )
    return state._replace(student=student), loss, jnp.int32(seen)

  def invert(state: State, work: Work) -> tuple[State, jax.Array, jax.Array]:
    assert state.pseudo is not None
    first = work.number * config.gen_chunk
    pseudo = generate(work.teacher, state.pseudo, first, state.key)
    return state._replace(pseudo=pseudo), pseudo.best.loss, jnp.int32(0)

  def step(state: State, work: Work):
    if config.algorithm == "teacher":  # nothing to train: its share of wrong answers
      return state, {"loss": 1 - test.accuracy}
    if gen_steps:
      # The step's number comes with the batch, so under a map over seeds this stays a branch.
      done = jax.lax.cond(work.number < gen_steps, invert, distil, state, work)
    else:
      done = distil(state, work)
    state, loss, seen = done
    metrics = {"loss": loss, "graphs": seen, "temperature": tau_of(state.student.rho)}
    if gen_steps:
      assert state.pseudo is not None
      metrics |= {f"generation/{name}": x for name, x in state.pseudo.best.terms.items()}
    return state, metrics

  def evaluate(state: State, test: Test) -> dict[str, jax.Array]:
    if config.algorithm == "teacher":
      return {"test_accuracy": test.accuracy, "teacher_accuracy": test.accuracy}

    def accuracy(batches: jraph.GraphsTuple) -> jax.Array:
      answer = lambda batch: student_logits(state.student, test.teacher, batch)
      return _accuracy(jax.lax.map(answer, batches), batches)

    metrics = {"test_accuracy": accuracy(test.batches), "teacher_accuracy": test.accuracy}
    if config.algorithm != "real":
      metrics["validation_accuracy"] = accuracy(test.validation)
    if state.pseudo is not None:
      agrees = state.pseudo.targets.logits.argmax(-1) == state.pseudo.labels
      edges = jnp.where(state.pseudo.pairs.mask, final(state.pseudo)[0], 0).sum(-1)
      metrics |= {
        "pseudo_accuracy": agrees.mean(),
        "pseudo_gap": state.pseudo.gap,
        "pseudo_edges": edges.mean(),
        "structure_parameters": state.pseudo.pairs.num_pairs.sum(),
      }
    return metrics

  def figures(state: State):
    if state.pseudo is None:
      return {}
    drawings = {}
    for name, pseudo in (("random start", init(state.key).pseudo), ("kept", state.pseudo)):
      assert pseudo is not None
      edges, features = final(pseudo)
      drawings[name] = pseudo_graph_figures.Graphs(
        *jax.device_get((
          pseudo.num_nodes, pseudo.labels, pseudo.pairs.source, pseudo.pairs.target,
          edges * pseudo.pairs.mask, features, jax.nn.softmax(pseudo.targets.logits),
        ))
      )  # fmt: skip
    return {
      "pseudo_graphs": pseudo_graph_figures.before_and_after(drawings, config.directed),
      "easy_to_hard": pseudo_graph_figures.complexity(drawings["kept"], _real_edges(material)),
    }

  about = f"{material.about}; {_describe(config, sizes)}"
  num_steps = 1 if config.algorithm == "teacher" else gen_steps + config.steps
  return Experiment(init, batches, step, evaluate, test, figures, num_steps, about)


def _describe(config: Config, sizes: Sizes) -> str:
  if config.algorithm == "published":
    return "student sees the pseudo-graphs of the published code"
  if config.algorithm not in MADE_UP:
    return "the student sees the teacher's training graphs: an upper bound"
  return (
    f"student sees no real graph: {sizes.graphs} pseudo-graphs of {sizes.low} to {sizes.high} nodes; "
    f"taken as known: this range, {sizes.features} features, {sizes.classes} classes; ACGKD is our "
    "reconstruction"
  )


def _answers(encoder: GraphEncoder, teacher: Classifier, batches: jraph.GraphsTuple) -> Targets:
  """The teacher's answers on stacked batches."""
  pooled = jax.lax.map(lambda batch: encoder.apply(teacher.variables, batch), batches)
  return Targets(teacher.head(pooled), pooled)


def _accuracy(logits: jax.Array, batches: jraph.GraphsTuple) -> jax.Array:
  right = logits.argmax(-1) == batches.globals["label"]
  return right.mean(where=batches.globals["mask"])


def _real_edges(material: graph_teachers.Material) -> np.ndarray:
  """Undirected edges per real test graph, for comparison in a picture."""
  return np.asarray(material.data.graphs.n_edge)[material.test] / 2
