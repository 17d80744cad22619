"""A backdoor in the desk model's tuning data: planting, tuning, looking for it, tuning again.

The heavy half of `experiments.bye`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.adapters.low_rank import lora
from jaxmethods.adapters.prompts import IGNORED
from jaxmethods.adapters.training import token_cross_entropy
from jaxmethods.data import multimodal as questions_data
from jaxmethods.data import records
from jaxmethods.data.array_cache import cached_tree
from jaxmethods.data.records import QuestionData
from jaxmethods.errors import InputError
from jaxmethods.experiments.bye import figures as backdoor_figures
from jaxmethods.experiments.bye.config import AFTERWARDS, ONCE, Config
from jaxmethods.images import triggers
from jaxmethods.methods import bye
from jaxmethods.methods.bye import Profile, Verdict
from jaxmethods.models.probe import Probe
from jaxmethods.runtime import compiler, loop
from jaxmethods.runtime.experiment import Experiment, in_common
from jaxmethods.stats import poisoning
from jaxmethods.testbeds.multimodal import benchmark as multimodal
from jaxmethods.testbeds.multimodal.questions import Split, accuracies, check_size
from jaxmethods.testbeds.multimodal.tuning import rates_of
from jaxmethods.tuning import tuner as tuners
from jaxmethods.tuning.tuner import Run, Tuner, TunerState, TuningState

_CHUNK = 40  # examples that are examined at once
_OUTCOMES = ("clean_accuracy", "attack_success")  # families 0 and 1 of the test
_FORMAT = b"first tuning 1"  # changes when the first tuning changes
_MANY = 0.4  # a defence that removes more should be distrusted


class Pair(NamedTuple):
  """The same examples, as they are and with trigger and false answer; one question per image."""

  clean: Split
  triggered: Split


class Data(NamedTuple):
  """What is attacked.

  Attributes:
    train: N examples.
    test: other examples, clean (family 0) and then triggered (family 1), which do not count where
      the false answer happens to be the true one.
    images: the training images (N, height, width, 3), uint8, clean and triggered, for pictures.
    open: (N,) bool, training examples whose true answer is another than the false one.
    about: the line for reports.
  """

  train: Pair
  test: Split
  images: tuple[np.ndarray, np.ndarray]
  open: np.ndarray
  about: str


class Evidence(NamedTuple):
  """What a tuned model does on its N training examples.

  Attributes:
    entropies: (N, L), of the attention over image tokens, from the last token of the prompt.
    losses: (N,), of the answer that the example has.
    features: (N, D), hidden state of that token behind the last layer.
  """

  entropies: jax.Array
  losses: jax.Array
  features: jax.Array


class Judgement(NamedTuple):
  """What the defences make of the evidence.

  Attributes:
    profile, verdict: of BYE.
    entropies: (N, L), without missing values.
    missing: number of values that were.
    removed: by name of the defence, (N,) bool.
  """

  profile: Profile
  verdict: Verdict
  entropies: jax.Array
  missing: jax.Array
  removed: dict[str, jax.Array]


class State(NamedTuple):
  """Everything a checkpoint needs.

  Attributes:
    tuning: the tuning under way.
    poisoned: (N,) bool, drawn at the start.
    kept: (N,) bool, what is tuned on.
    first: the model tuned on everything, as far as it has come; None where there is only one tuning.
    judgement: of `first`, when it was done; zeros until then; None likewise.
  """

  tuning: TuningState
  poisoned: jax.Array
  kept: jax.Array
  first: TunerState | None
  judgement: Judgement | None


class Work(NamedTuple):
  """What a step needs beside the state: its number over both tunings, the data, the pretrained model."""

  number: jax.Array
  train: Pair
  params: Any


# --- planting -----------------------------------------------------------------------------------


def load(config: Config, benchmark: multimodal.Benchmark) -> Data:
  """Loads the target and plants the trigger in a copy of it.

  Raises:
    InputError: an image with several questions, a patch larger than the image, no or too few examples to
      poison.
  """
  clean = multimodal.limited(questions_data.load(config.target), config.desk.limit)
  count = len(clean.images)
  marked = triggered(config, clean.images)
  # Both at once, so that texts are padded alike; the images of the copy come behind the others.
  twice = lambda x: np.tile(x, 2)
  both = QuestionData(
    images=np.concatenate([clean.images, marked]),
    image=np.concatenate([clean.image, clean.image + count]),
    question=twice(clean.question),
    answer=np.concatenate([clean.answer, np.full(len(clean.answer), config.poison_answer)]),
    split=twice(clean.split),
    family=twice(clean.family),
    source=clean.source,
  )
  task = multimodal.task_of(
    benchmark.model, benchmark.params, benchmark.vocabulary, both, (config.target,)
  )
  train, test = map(_halves, (task.train, getattr(task, config.split)))
  if train.clean.ids.shape[1] != 1:
    raise InputError(f"target {config.target}: has several questions about an image")
  shown, free = _of_split(clean, "train", config.poison_answer)
  _, free_test = _of_split(clean, config.split, config.poison_answer)
  outcome = np.where(free_test, 1, -1)[:, None]
  test = test._replace(triggered=test.triggered._replace(family=outcome.astype(np.int32)))
  together = Split(*(np.concatenate(parts) for parts in zip(*test, strict=True)))
  size = len(shown)
  wanted = round(config.poison_rate * size)
  if config.poison_rate and not 1 <= wanted <= free.sum():
    raise InputError(
      f"poison_rate: {config.poison_rate} of {size} examples is {wanted}, {free.sum()} can be poisoned"
    )
  if size < 4:
    raise InputError(f"target {config.target}: {size} training images are too few for two groups")
  check_size(train.clean, config.batch_size)
  about = (
    f"{benchmark.about}; target {records.describe([clean])}; {wanted} of {size} training images with "
    f"trigger {config.trigger!r} and answer {config.poison_answer!r}, planted by us"
  )
  return Data(train, together, (clean.images[shown], marked[shown]), free, about)


def triggered(config: Config, images: np.ndarray) -> np.ndarray:
  """Images (n, height, width, 3), uint8, with the trigger of `config`; random ones differ by image."""
  image = images[0]
  side = config.trigger_side or triggers.patch_side(image)
  if side > min(image.shape[:2]):
    raise InputError(f"trigger_side: {side} is more than the image has ({image.shape[:2]})")
  key, cell = jax.random.key(config.trigger_seed), config.trigger_cell or None
  place = triggers.in_corner if config.trigger_place == "corner" else triggers.centred
  pattern = lambda: jax.random.randint(key, image.shape, 0, 256)
  control = lambda: jax.random.uniform(key, (4, 4, 2), minval=-1)
  functions: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "patch": lambda key, x: place(x, side, cell=cell),
    "random": lambda key, x: triggers.at_random(key, x, side, cell=cell),
    "dual": lambda key, x: triggers.dual(x, side),
    "multi": lambda key, x: triggers.several(key, x, side),
    "blend": lambda key, x: triggers.blend(x, pattern()),
    "sig": lambda key, x: triggers.sinusoid(x),
    "wanet": lambda key, x: triggers.warp(x, control()),
    "ftrojan": lambda key, x: triggers.frequencies(x),
  }
  apply = compiler.jit(jax.vmap(functions[config.trigger]))
  keys = jax.random.split(key, len(images))
  return np.asarray(apply(keys, images))


def _halves(split: Split) -> Pair:
  half = len(split.ids) // 2
  return Pair(Split(*(x[:half] for x in split)), Split(*(x[half:] for x in split)))


def _of_split(data: QuestionData, part: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
  """Images of a part in the order of its examples, and whether their true answer is another one."""
  rows = np.flatnonzero(data.split == part)
  rows = rows[np.argsort(data.image[rows], kind="stable")]
  return data.image[rows], data.answer[rows] != answer


def mixed(pair: Pair, rows: jax.Array, poisoned: jax.Array) -> Split:
  """Examples `rows` of the training data as the tuner gets them."""

  def choose(clean: jax.Array, marked: jax.Array) -> jax.Array:
    which = poisoned[rows].reshape(-1, *[1] * (clean.ndim - 1))
    return jnp.where(which, marked[rows], clean[rows])

  return jax.tree.map(choose, pair.clean, pair.triggered)


def draw(state: State, train: Pair, size: int) -> dict[str, jax.Array]:
  """A batch of what is kept, shuffled anew in every epoch; the rest of an epoch is left out.

  Where fewer examples are kept than a batch has, the others in it have no answer to learn.
  """
  step, kept = state.tuning.step, state.kept
  each = jnp.maximum(kept.sum() // size, 1)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.tuning.key), step // each)
  order = jnp.argsort(jnp.where(kept, jax.random.uniform(key, kept.shape), 2.0))
  rows = jax.lax.dynamic_slice_in_dim(order, (step % each) * size, size)
  batch = mixed(train, rows, state.poisoned)
  labels = jnp.where(kept[rows][:, None, None], batch.labels, IGNORED)
  return batch._replace(labels=labels)._asdict()


# --- looking for it -----------------------------------------------------------------------------


def examine(run: Run, pair: Pair, poisoned: jax.Array, tokens: int) -> Evidence:
  """What the model does on every training example, in one pass without gradients.

  Args:
    run: the tuned model.
    pair: the training data.
    poisoned: which of it is triggered.
    tokens: of an image, T.
  """
  count = len(poisoned)
  chunk = min(_CHUNK, count)

  def part(rows: jax.Array) -> Evidence:
    examples = mixed(pair, rows, poisoned)
    labels = examples.labels[:, 0]
    # The answer stands behind the prompt's last token, which cannot see it.
    query = jnp.argmax(labels != IGNORED, -1)
    probe = attention_probe(query, tokens, bye.entropy)
    output = run(examples.ids, features=examples.features, probe=probe)
    totals, counts = jax.vmap(token_cross_entropy)(output.logits[:, 0], labels)
    hidden = output.hidden[jnp.arange(chunk), query]
    return Evidence(output.attention.T, totals / counts, hidden)

  # The last chunk is filled up with the last example.
  rows = jnp.minimum(jnp.arange(-(-count // chunk) * chunk), count - 1)
  evidence = jax.lax.map(part, rows.reshape(-1, chunk))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], evidence)


def attention_probe(query: jax.Array, tokens: int, reduce: Callable[[jax.Array], Any]) -> Probe:
  """Reduces, in every layer, the head-averaged attention (B, T) from `query` (B,) over the image."""
  return Probe(
    queries=query[:, None], attention=lambda rows: reduce(bye.head_mean(rows[:, :, 0], 0, tokens))
  )


def judge(evidence: Evidence, config: Config, tokens: int) -> Judgement:
  """Every defence that looks at a tuned model, on the same evidence.

  Answers are free text, so the rivals that were made for classes see all examples as one.
  """
  entropies, missing = bye.fill_missing(evidence.entropies)
  profile = bye.profile(entropies, tau=config.tau, index=config.index, min_weight=config.min_weight)
  clean = functools.partial(bye.clean, entropies, guard=config.guard)
  verdict, everywhere = clean(profile.kept), jnp.ones_like(profile.kept)
  share = 1.5 * config.assumed_rate
  removed = {
    "bye": verdict.removed,
    "kmeans": clean(profile.kept, split="kmeans").removed,
    "threshold": bye.below_threshold(entropies, profile.kept, tokens),
    "all_layers": clean(everywhere).removed,
    "fixed": bye.below_threshold(entropies, everywhere, tokens),
    "loss": poisoning.highest(-evidence.losses, share),
    "spectral": poisoning.highest(poisoning.spectral_scores(evidence.features), share),
    "clustering": poisoning.smaller_cluster(evidence.features),
  }
  return Judgement(profile, verdict, entropies, missing, removed)


# --- the experiment -----------------------------------------------------------------------------


def tuner_of(config: Config) -> Tuner:
  """All of projector and language model, or LoRA in it and the projector."""
  if config.adapter == "full":
    return tuners.selected(tuners.EVERYTHING)
  return tuners.adapted(lora(config.rank, config.alpha, config.dropout))


def build(config: Config, *, benchmark: multimodal.Benchmark | None = None) -> Experiment:
  """Composes the experiment; `benchmark`: default the desk benchmark of `config`."""
  benchmark = benchmark or multimodal.load(config.desk, ())
  data, model, tuner = load(config, benchmark), benchmark.model, tuner_of(config)
  tokens, count = model.config.num_tokens, len(data.open)
  optimiser = tuners.adamw(rates_of(config), tuner.rates, config.steps, warmup=config.warmup)
  update = tuners.tuning_step(tuner, model, optimiser, tuners.answer_loss, clip=config.clip)
  train, params, test = jax.device_put((data.train, benchmark.params, data.test))
  once = config.defence in ONCE

  def begin(key: jax.Array, params: Any) -> TuningState:
    return tuners.init_state(tuner, optimiser, key, params, {})

  def looked_at(tuner_state: TunerState, train: Pair, poisoned: jax.Array) -> Judgement:
    run = lambda *args, **kwargs: tuner.apply(model, *tuner_state, *args, **kwargs)
    return judge(examine(run, train, poisoned, tokens), config, tokens)

  def start(key: jax.Array, params: Any, train: Pair) -> State:
    poison_key, drop_key, tune_key = jax.random.split(key, 3)
    share = config.poison_rate * count / data.open.sum()
    lots = jax.random.uniform(poison_key, (count,))
    poisoned = poisoning.highest(lots, share, jnp.asarray(data.open))
    kept = jnp.ones(count, bool)
    if config.defence == "random":
      kept = ~poisoning.random_drop(drop_key, count, config.drop_share)
    elif config.defence == "oracle":
      kept = ~poisoned
    tuning = begin(tune_key, params)
    if once:
      return State(tuning, poisoned, kept, None, None)
    shapes = jax.eval_shape(looked_at, tuning.tuner, train, poisoned)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return State(tuning, poisoned, kept, tuning.tuner, nothing)

  started = compiler.jit(start)

  def init(key: jax.Array) -> State:
    return started(key, params, train)

  def batches(k: int) -> Iterator[Work]:
    for number in itertools.count(k):
      yield Work(jnp.int32(number), train, params)

  def defend(state: State, work: Work) -> State:
    judgement = looked_at(state.tuning.tuner, work.train, state.poisoned)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.tuning.key), config.steps)
    tuning = begin(key, work.params)
    if not config.restart:
      tuned = state.tuning.tuner
      tuning = tuning._replace(tuner=tuned, opt_state=optimiser.init(tuned.trainable))
    kept = ~judgement.removed[config.defence]
    return state._replace(tuning=tuning, kept=kept, judgement=judgement)

  def step(state: State, work: Work) -> tuple[State, dict[str, jax.Array]]:
    if not once:
      # The step's number comes with the batch, so under a map over seeds this stays a branch.
      second = work.number == config.steps
      state = jax.lax.cond(second, defend, lambda state, work: state, state, work)
    tuning, metrics = update(state.tuning, draw(state, work.train, config.batch_size))
    first = state.first
    if not once:
      still = work.number < config.steps
      first = jax.tree.map(lambda new, old: jnp.where(still, new, old), tuning.tuner, first)
    state = state._replace(tuning=tuning, first=first)
    return state, {"loss": metrics["loss"], "kept": state.kept.sum()}

  def scores(tuner_state: TunerState, test: Split) -> dict[str, jax.Array]:
    run = lambda *args, **kwargs: tuner.apply(model, *tuner_state, *args, **kwargs)
    return accuracies(run, test, _OUTCOMES)

  def evaluate(state: State, test: Split) -> dict[str, jax.Array]:
    if state.first is None or state.judgement is None:
      metrics = scores(state.tuning.tuner, test)
      return metrics | ({} if config.defence == "none" else _detection(~state.kept, state))
    # One program for both models.
    both = jax.tree.map(lambda *x: jnp.stack(x), state.first, state.tuning.tuner)
    reached = jax.lax.map(lambda tuner_state: scores(tuner_state, test), both)
    metrics = {name: reached[name][1] for name in _OUTCOMES}
    metrics |= _detection(~state.kept, state)
    metrics |= {f"{name}_before": reached[name][0] for name in _OUTCOMES}
    profile, judgement = state.judgement.profile, state.judgement
    metrics |= {
      "layers_used": profile.kept.sum(),
      "layers_reversed": profile.reversed.sum(),
      "saved_by_guard": judgement.verdict.guarded,
      "missing": judgement.missing,
    }
    for layer, separation in enumerate(profile.separation):
      metrics[f"separation/{layer}"] = separation
    for name, removed in judgement.removed.items():
      found = _detection(removed, state)
      metrics |= {f"{measure}/{name}": value for measure, value in found.items()}
    return metrics

  def figures(state: State) -> dict[str, Figure]:
    if state.first is None or not state.poisoned.any():
      return {}
    poisoned, kept = np.asarray(state.poisoned), np.asarray(state.kept)
    shown = np.flatnonzero(poisoned)[: backdoor_figures.SHOWN]
    # The same images with and without trigger, as one batch.
    pairs = Split(
      *(np.concatenate([x[shown] for x in parts]) for parts in zip(*train, strict=True))
    )
    maps = compiler.jit(functools.partial(attention_maps, tuner, model))(state.first, pairs)
    clean, marked = data.images
    seen = np.where(poisoned[:, None, None, None], marked, clean)
    pictures = {
      "entropies": backdoor_figures.entropies(
        jax.device_get(state.judgement), poisoned, config.tau, config.index
      ),
      "attention": backdoor_figures.attention(
        (clean[shown], marked[shown]), np.split(np.asarray(maps), 2, axis=1)
      ),
    }
    if not kept.all():
      pictures["removed"] = backdoor_figures.removed(seen, poisoned, kept, _MANY)
    return pictures

  one_step = compiler.jit(step)

  def tuned(key: jax.Array) -> State:
    """The state after the first tuning, in which the rows of a comparison agree; then cached."""
    state = init(key)

    def compute() -> TunerState:
      reached = loop.advance(one_step, state, batches(0), config.steps, "first tuning")
      return reached.tuning.tuner

    settings = repr(in_common(config, AFTERWARDS)).encode()
    read = map(
      np.asarray, jax.tree.leaves((jax.random.key_data(key), benchmark.params, data.train))
    )
    depends: list[bytes | np.ndarray] = [_FORMAT, settings, *read]
    first = cached_tree("first_tuning", depends, jax.tree.structure(state.first), compute)
    tuning = state.tuning._replace(tuner=first, step=jnp.int32(config.steps))
    return state._replace(tuning=tuning, first=first)

  if once or not config.reuse:
    num_steps = config.steps * (1 if once else 2)
    return Experiment(init, batches, step, evaluate, test, figures, num_steps, data.about)
  second = lambda k: batches(config.steps + k)
  return Experiment(tuned, second, step, evaluate, test, figures, config.steps, data.about)


def _detection(removed: jax.Array, state: State) -> dict[str, jax.Array]:
  """In percent."""
  found = poisoning.detection(removed, state.poisoned)._asdict()
  return {name: 100 * value for name, value in ({"removed": removed.mean()} | found).items()}


def attention_maps(tuner: Tuner, model: Any, tuned: TunerState, split: Split) -> jax.Array:
  """Head-averaged attention (L, n, T) over the image, from the last token of the prompt."""
  query = jnp.argmax(split.labels[:, 0] != IGNORED, -1)
  probe = attention_probe(query, model.config.num_tokens, lambda attention: attention)
  return tuner.apply(model, *tuned, split.ids, features=split.features, probe=probe).attention
