"""Texts of a given model: where they end, what is read of them, and what kept ones depend on."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmethods.data.model_sources import load_causal_lm, save_causal_lm
from jaxmethods.errors import InputError
from jaxmethods.testbeds.language import writer as writing
from jaxmethods.testbeds.language.writer import Writer
from jaxmethods.trees import flatten, unflatten

WORDS = ["<pad>", "<bos>", "<end_of_text>", "<end_of_turn>", *(f"w{i}" for i in range(28))]
SHAPE = {
  "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32,
  "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
  "bos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path / "cache"))


def chain(params, follow):
  """Parameters of a model whose layers add nothing: every token has one that follows it, else w0."""
  flat = {path: np.array(x) for path, x in flatten(params).items()}
  for path, x in flat.items():
    if "layers" in path and "kernel" in path:
      x[...] = 0
    elif "embed" in path:
      x[...] = 8 * np.eye(32)
    elif "head" in path:
      x[...] = 0
      for token in range(32):
        x[token, follow.get(token, 4)] = 1
  return unflatten(flat)


def save(folder, follow, *, config=None, generation=None, special=True):
  """Writes a checkpoint with tokenizer; the tokenizer ends texts with <end_of_text> only."""
  loaded = load_causal_lm(f"random:{json.dumps(SHAPE | (config or {}))}")
  save_causal_lm(folder, loaded, chain(loaded.params, follow))
  words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  extra = ["<end_of_turn>"] if special else []
  PreTrainedTokenizerFast(
    tokenizer_object=words, eos_token="<end_of_text>", bos_token="<bos>", pad_token="<pad>",
    additional_special_tokens=extra,
  ).save_pretrained(folder)  # fmt: skip
  if generation is not None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
  return load_causal_lm(f"hf:{folder}")


FOLLOW = {10: 11, 11: 12, 12: 3}  # w6 w7 w8 <end_of_turn>


@pytest.mark.parametrize(
  ("config", "generation"),
  [
    ({"eos_token_id": [2, 3]}, None),
    ({"eos_token_id": 3}, None),
    ({"eos_token_id": 2}, {"eos_token_id": [3]}),
    ({}, {"eos_token_id": 3}),
    ({"eos_token_id": None}, {"eos_token_id": (2, 3)}),
  ],
)
@pytest.mark.parametrize("special", [True, False])
def test_texts_end_at_every_end_token(tmp_path, config, generation, special):
  loaded = save(tmp_path / "m", FOLLOW, config=config, generation=generation, special=special)
  writer = Writer(loaded, 1)
  assert writer.eos == (2, 3)
  written = writer.write([[1, 10]], 8)
  assert written.texts == ["w7 w8"]  # the end token is no part of it
  assert written.lengths.tolist() == [3]
  assert written.finished.tolist() == [True]


def test_without_a_word_of_the_files_the_tokenizer_counts(tmp_path):
  writer = Writer(save(tmp_path / "m", FOLLOW), 1)
  assert writer.eos == (2,)
  written = writer.write([[1, 10]], 8)
  assert written.lengths.tolist() == [8]
  assert not written.finished.any()


@pytest.mark.parametrize("token", ["</s>", True, [2, "3"]])
def test_an_end_token_that_is_no_number_is_named(tmp_path, token):
  loaded = save(tmp_path / "m", FOLLOW, generation={"eos_token_id": token})
  with pytest.raises(InputError, match=r"eos_token_id of generation_config.json: .* is no token"):
    Writer(loaded, 1)


def test_kept_texts_are_those_of_all_weights(tmp_path, monkeypatch):
  loaded = save(tmp_path / "m", FOLLOW, config={"eos_token_id": [2, 3]})
  first = Writer(loaded, 1).write([[1, 10]], 8)
  kept = tmp_path / "cache" / "generations"
  assert len(list(kept.iterdir())) == 1
  with monkeypatch.context() as patch:
    patch.setattr(writing, "_on_host", lambda *args: pytest.fail("written anew"))
    assert Writer(loaded, 1).write([[1, 10]], 8).texts == first.texts
  # One row of the embedding, as the training of one token changes it: w6 acts as w7.
  changed = {path: np.array(x) for path, x in flatten(loaded.params).items()}
  (table,) = (x for path, x in changed.items() if "embed" in path)
  table[10] = table[11]
  other = Writer(loaded._replace(params=unflatten(changed)), 1).write([[1, 10]], 8)
  assert other.texts == ["w8"]
  assert len(list(kept.iterdir())) == 2


def test_batches_and_samples_are_put_together(tmp_path):
  writer = Writer(save(tmp_path / "m", FOLLOW, config={"eos_token_id": [2, 3]}), 2)
  prompts = [[1, 10], [1, 5, 11], [12]]
  written = writer.write(prompts, 4)
  assert written.texts == ["w7 w8", "w8", ""]
  assert written.ids.shape == (3, 16 + 4)
  drawn = writer.write(prompts, 4, temperature=1e-3, num_samples=2)
  assert drawn.texts == ["w7 w8", "w7 w8", "w8", "w8", "", ""]
  assert writer.token_ends(np.array([11, 12])) == [2, 5]


def test_the_weights_are_an_argument(tmp_path):
  """The program holds no weights: its text does not grow with them."""
  loaded = save(tmp_path / "m", FOLLOW)
  sampling, ids = writing.Sampling(4), np.ones((1, 8), np.int32)
  run = lambda params, ids: writing._continue(
    loaded.model, sampling, (2,), params, ids, ids > 0, jax.random.key(0)
  )
  consts = jax.make_jaxpr(run)(loaded.params, ids).consts
  assert all(np.size(x) < 32 * 32 for x in consts)  # the smallest kernel
