"""Tuning of a causal LM on texts: rows of tokens, ways of tuning, privacy, exports, bad input."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxmethods.adapters.training import token_cross_entropy
from jaxmethods.data import text_examples
from jaxmethods.data.model_sources import load_causal_lm
from jaxmethods.errors import InputError
from jaxmethods.experiments.tuning import build as room
from jaxmethods.experiments.tuning.config import Config, rows
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.language import starter, tokens, tuning
from jaxmethods.testbeds.language.settings import AdapterSettings

MODEL = {
  "model_type": "llama", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 24,
  "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
  "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 0,
}  # fmt: skip
SMALL = AdapterSettings(
  rank=2,
  vera_rank=8,
  oft_block=2,
  bottleneck=2,
  prompt_length=3,
  last=1,
  prune_at=2,
  keep_ratio=0.5,
)
NAME = f"random:{json.dumps(MODEL)}"
TEMPLATE = (
  "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config(**changes):
  small = {
    "model": NAME, "tokenizer": starter.NAME, "steps": 30, "num_train": 24, "num_test": 4,
    "batch_size": 8, "chunk": 4, "max_new_tokens": 4, "learning_rate": 0.02, "own_rate": 0.02,
    "probe_size": 4, "tuner": SMALL,
  }  # fmt: skip
  return Config(**(small | changes))


@functools.cache
def material():
  return room.load(config())


@functools.cache
def tokenizer():
  return starter.make_tokenizer()


def speech(template="", ends=(0,)):
  own = starter.make_tokenizer() if template else tokenizer()
  if template:
    own.chat_template = template
  return tokens.speech("it", own, ends, 400, "auto")


def write(path, *lines):
  path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
  return f"jsonl:{path}"


# --- rows of tokens -------------------------------------------------------------------------------


def test_only_answers_count(tmp_path):
  """A pair, a text, and a conversation under a template; ends are learnt, what follows is not."""
  chat = [
    {"role": "system", "content": "Sum."}, {"role": "user", "content": "1 and 2"},
    {"role": "assistant", "content": "3"}, {"role": "user", "content": "and 4"},
    {"role": "assistant", "content": "7"},
  ]  # fmt: skip
  file = write(
    tmp_path / "a.jsonl", {"prompt": "1 + 1", "completion": "2", "id": 7}, {"text": "a story"},
    {"messages": chat},
  )  # fmt: skip
  pair, story, talk = text_examples.load(file, 0, 0).examples
  assert "fields not used: id" in text_examples.load(file, 0, 0).about
  decode = tokenizer().decode
  row = tokens.row(speech(), pair)
  assert decode(row.ids) == "1 + 1\n2<end>"
  assert decode(row.ids[row.counts]) == "2<end>"
  assert decode(tokens.prompt(speech(), pair)) == "1 + 1\n"
  row = tokens.row(speech(), story)
  assert decode(row.ids[row.counts]) == "a story<end>"
  row = tokens.row(speech(TEMPLATE), talk)
  assert decode(row.ids) == (
    "<system>Sum.<end>\n<user>1 and 2<end>\n<assistant>3<end>\n<user>and 4<end>\n<assistant>7<end>"
  )
  assert decode(row.ids[row.counts]) == "3<end>7<end>"
  assert decode(tokens.prompt(speech(TEMPLATE), talk)).endswith("and 4<end>\n<assistant>")


def test_truncation_is_counted_and_prompts_must_fit():
  examples = text_examples.load("generated:word-problems", 6, 0).examples
  found = [tokens.row(speech(), example) for example in examples]
  lengths = [len(row.ids) for row in found]
  limit = sorted(lengths)[3]
  table = tokens.table(found, examples, limit, packing=False)
  assert table.truncated == sum(length > limit for length in lengths) > 0
  assert table.counted == sum(int(row.counts[:limit].sum()) for row in found)
  with pytest.raises(InputError, match="generated:word-problems, 1: its prompt is"):
    tokens.table(found, examples, 10, packing=False)


def test_a_packed_row_is_its_texts_one_by_one():
  examples = text_examples.load("generated:word-problems", 9, 0).examples
  found = [tokens.row(speech(), example) for example in examples]
  model, params, _ = material().loaded
  run = functools.partial(model.apply, {"params": params})
  sums = []
  for packing in (False, True):
    table = tokens.table(found, examples, 128, packing=packing)
    assert table.truncated == 0
    sums.append(tuning.text_loss(run, table.arrays, None))
  assert len(table.arrays["ids"]) < len(examples)
  np.testing.assert_allclose(*np.array(sums), rtol=1e-5)
  # The same as the labels at their own places.
  table = tokens.table(found, examples, 128, packing=False).arrays
  labels = np.full(table["ids"].shape, IGNORED)
  for n, row in enumerate(found):
    labels[n, : len(row.ids)][row.counts] = row.ids[row.counts]
  logits = run(table["ids"], mask=table["mask"]).logits
  total, count = token_cross_entropy(logits[:, :-1], labels[:, 1:])
  np.testing.assert_allclose((total, count), sums[0], rtol=1e-5)


# --- training -------------------------------------------------------------------------------------


def trained(settings, steps=None):
  experiment = room.build(settings, material=material())
  state, batches = experiment.init(jax.random.key(1)), experiment.batches(0)
  step, losses = jax.jit(experiment.step), []
  for _ in range(steps or settings.steps):
    state, metrics = step(state, next(batches))
    losses.append(float(metrics["task_loss"]))
  return experiment, state, losses


def test_it_learns_and_writes():
  experiment, state, losses = trained(config(adapter="full"))
  assert losses[-1] < 0.7 * losses[0]
  metrics = jax.jit(experiment.evaluate)(state, experiment.test)
  assert next(iter(experiment.evaluate(state, experiment.test))) == "accuracy"
  assert float(metrics["test_loss"]) < float(metrics["before_test_loss"])
  assert set(experiment.figures(state)) == {"generations"}
  (content,) = experiment.files(state).values()
  lines = [json.loads(line) for line in content.splitlines()]
  assert len(lines) == 4
  assert {"prompt", "written", "right", "correct"} == set(lines[0])
  again, first = experiment.batches(3), experiment.batches(0)
  for _ in range(3):
    next(first)
  np.testing.assert_array_equal(next(again)["ids"], next(first)["ids"])


def test_answers_are_judged_as_they_are_written():
  """The judge sees each text once, at its own place, whatever the chunks."""
  texts = ["7 + 1 = 8. Answer: 8", "nothing", "Answer: 40", "41"]
  rights = ["3 + 5 = 8. Answer: 8", "Answer: 1", "Answer: 41", "41"]
  judge = tuning.judge_of(speech(), rights)
  ids = [[*tokenizer().encode(text), 0] for text in texts]
  longest = max(map(len, ids))
  written = np.array([row + [0] * (longest - len(row)) for row in ids])
  lengths = np.array(list(map(len, ids)))
  assert judge(written, lengths, np.arange(4)).tolist() == [True, False, False, True]
  assert judge(written[:2], lengths[:2], np.array([3, 9])).tolist() == [False, False]


@pytest.mark.parametrize("name", list(rows(config())))
def test_rows_trace_and_start_as_the_model(name):
  settings = rows(config())[name]
  experiment = room.build(settings, material=material())
  state, batch = experiment.init(jax.random.key(0)), next(experiment.batches(0))
  after, _ = jax.eval_shape(experiment.step, state, batch)
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
  if settings.is_private:
    assert abs(float(experiment.evaluate.args[0].guarantee.epsilon) - settings.dp_epsilon) < 0.1
    assert batch["real"].shape == batch["ids"].shape[:1]
  keeps = {"merged", "hf"} & set(experiment.export.formats)
  assert bool(keeps) or name in ("serial_adapter", "parallel_adapter", "loramoe")


def test_private_steps_do_not_see_the_probe_and_state_their_epsilon():
  settings = config(dp_epsilon=8.0, steps=6)
  experiment, state, losses = trained(settings)
  assert np.isfinite(losses).all()
  metrics = jax.eval_shape(experiment.evaluate, state, experiment.test)
  assert {"epsilon", "delta"} <= set(metrics)
  assert "-DP for one example" in experiment.about


def test_parts_of_a_batch_are_the_batch():
  (_, once, losses), (_, parts, others) = (trained(config(accumulate=count), 3) for count in (1, 4))
  np.testing.assert_allclose(losses, others, rtol=1e-4)
  same = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
  jax.tree.map(same, once.tuner.trainable, parts.tuner.trainable)


def test_on_a_mesh_it_is_the_same():
  auto = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=auto)
  settings = config(adapter="full", packing=True)
  plain = room.build(settings, material=room.load(settings))
  spread = room.build(settings, mesh)
  losses = []
  for experiment in (plain, spread):
    batch = next(experiment.batches(0))
    _, metrics = jax.jit(experiment.step)(experiment.init(jax.random.key(0)), batch)
    losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert "segments" in batch
  assert batch["ids"].sharding.mesh == mesh


# --- exports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lora", "spider", "lorasculpt"])
def test_a_merged_checkpoint_computes_the_same(tmp_path, name):
  experiment, state, _ = trained(config(adapter=name), 3)
  (tmp_path / "out").mkdir()
  experiment.export.write(state, "merged", tmp_path / "out")
  loaded = load_causal_lm(f"hf:{tmp_path / 'out'}")
  ids = np.arange(12).reshape(1, 12)
  run, _, _ = tuning.tuned(experiment.evaluate.args[0].way.tuner, loaded.model, state)
  theirs = loaded.model.apply({"params": loaded.params}, ids).logits
  np.testing.assert_allclose(theirs, run(ids).logits, atol=1e-5)
  assert loaded.files.tokenizer().encode("12 apples") == tokenizer().encode("12 apples")


@pytest.mark.peft
@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "vera", "lorasculpt", "prompt"])
def test_peft_and_transformers_load_an_export(tmp_path, name):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  experiment, state, _ = trained(config(adapter=name), 5)
  folder = tmp_path / "hf"
  folder.mkdir()
  experiment.export.write(state, "hf", folder)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  assert transformers.AutoTokenizer.from_pretrained(folder).encode("7") == tokenizer().encode("7")
  theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
  ids = np.arange(2, 26).reshape(2, 12)
  way, model = experiment.evaluate.args[0].way, material().loaded.model
  ours = np.asarray(way.tuner.apply(model, *state.tuner, ids).logits)[:, -12:]
  with torch.no_grad():
    logits = theirs(torch.tensor(ids)).logits.numpy()[:, -12:]
  np.testing.assert_allclose(logits, ours, rtol=1e-3, atol=1e-4)


def test_the_command_exports_with_a_card(cli, tmp_path):
  words = [
    "--model", NAME, "--tokenizer", starter.NAME, "--num_train=12", "--num_test=2", "--steps=2",
    "--max_new_tokens=2", "--batch_size=4", "--dp_noise=1.0",
  ]  # fmt: skip
  done = cli("train.run", "--method", "tuning", "--workdir", "w", *words, "--export", "peft")
  assert done.returncode == 0, done.stderr
  adapter = tmp_path / "w" / "export-peft"
  assert (adapter / "adapter_model.safetensors").exists()
  card = (adapter / "README.md").read_text()
  for said in ("| epsilon |", "| delta |", "trained on 12", "dp_noise"):
    assert said in card
  again = cli("train.export", "--workdir", "w", "--format", "merged")
  assert again.returncode == 0, again.stderr
  merged = tmp_path / "w" / "export-merged"
  assert (merged / "config.json").exists()
  assert (merged / "tokenizer.json").exists()
  over = cli("train.export", "--workdir", "w", "--format", "merged")
  assert over.returncode == 0, over.stderr
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "note").write_text("keep")
  other = cli("train.export", "--workdir", "w", "--format", "hf", "--to", "mine")
  assert other.returncode == 2
  assert "holds something else" in other.stderr


# --- bad input ------------------------------------------------------------------------------------


def test_bad_files(tmp_path):
  file = tmp_path / "x.jsonl"
  for lines, message in (
    ([], "has no example in it"),
    ([{"prompt": "a"}], 'line 1: has no answer: "prompt" needs "completion"'),
    ([{"prompt": "a", "completion": " "}], 'line 1: has no answer: "completion" is empty'),
    ([{"text": "a"}, {"question": "b"}], 'line 2: has no answer: "question" needs "answer"'),
    ([{"messages": [{"role": "user", "content": "a"}]}], "has no answer: the last message"),
    ([{"messages": [{"role": "robot", "content": "a"}]}], "role 'robot' is none of"),
    ([{"input": "a"}], "it has input"),
    ([[1]], "line 1: expected an object"),
  ):
    name = write(file, *lines) if lines else f"jsonl:{file}"
    if not lines:
      file.write_text("\n")
    with pytest.raises(InputError, match=message):
      text_examples.load(name, 0, 0)
  with pytest.raises(InputError, match="data: unknown source 'nothing'"):
    text_examples.load("nothing", 3, 0)


def test_bad_runs(tmp_path):
  long = write(
    tmp_path / "long.jsonl", *({"prompt": f"{n} " * 200, "completion": "1"} for n in (1, 2))
  )
  wide = json.dumps(MODEL | {"vocab_size": 300})
  rank = AdapterSettings(targets="no_such_layer")
  for changes, message in (
    ({"data": long, "num_test": 1}, "line 1: its prompt is 401 tokens, a row has 128"),
    ({"model": f"random:{wide}"}, "has a vocabulary of 300, its tokenizer one of 400"),
    ({"max_length": 500}, "max_length: 500 is more than the context"),
    ({"batch_size": 80}, "batch_size: 80 is more than the 24 rows"),
    ({"tuner": rank}, "tuner: targets 'no_such_layer' matches no parameter path"),
    ({"tokenizer": ""}, "has no tokenizer"),
    ({"dp_epsilon": 1e-4, "dp_delta": 1e-5}, "dp_epsilon: epsilon 0.0001 cannot be reached"),
    ({"tuner": dataclasses.replace(rank, targets="x"), "adapter": "prompt"}, "prompt has none"),
  ):
    with pytest.raises(InputError, match=message):
      room.build(config(**changes))
  for changes, message in (
    ({"dp_epsilon": 8.0, "packing": True}, "packing"),
    ({"dp_epsilon": 8.0, "dp_noise": 1.0}, "dp_noise"),
    ({"dp_epsilon": 8.0, "adapter": "gradient_mask"}, "statistics of the training data"),
    ({"accumulate": 3}, "accumulate: must divide the batch of 8"),
  ):
    with pytest.raises(ValueError, match=message):
      config(**changes)
