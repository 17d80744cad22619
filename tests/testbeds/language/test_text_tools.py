"""Detectors and filters on texts of the user."""

import json

import jax
import numpy as np
import pytest

from jaxmethods.data.model_sources import load_causal_lm
from jaxmethods.errors import InputError
from jaxmethods.methods.llm_safety import watermark
from jaxmethods.testbeds.language import text_tools
from jaxmethods.testbeds.language.text_tools import Text

KEY, VOCABULARY, GAMMA = 15485863, 50, 0.25
MODEL = """random:{"model_type": "llama", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16,
  "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
  "max_position_embeddings": 64}"""


class Letters:
  """A tokenizer of letters, with a token of its own before every text."""

  all_special_ids = (0,)

  def encode(self, text):
    return [0, *(1 + ord(c) % 40 for c in text)]


def marked(count, seed=0):
  """A text of green tokens alone."""
  table = np.asarray(watermark.green_table(jax.random.key(KEY), VOCABULARY, GAMMA))
  draw, ids = np.random.default_rng(seed), [1]
  while len(ids) < count:
    ids.append(int(draw.choice(np.flatnonzero(table[ids[-1]]))))
  return ids


def written(folder, *lines):
  file = folder / "texts.jsonl"
  file.write_text("\n".join(json.dumps(line) for line in lines))
  return file


def detected(texts, **more):
  tokens = text_tools.tokens_of(texts, Letters(), VOCABULARY)
  given = {"key": KEY, "vocabulary": VOCABULARY, "gamma": GAMMA, **more}
  return text_tools.watermarks(texts, tokens, **given)


def test_a_marked_text_is_told_from_others_whatever_stands_beside_it(tmp_path, monkeypatch):
  plain = np.random.default_rng(1).integers(0, VOCABULARY, 90).tolist()
  file = written(tmp_path, {"ids": marked(60)}, {"ids": plain}, {"text": "some words of mine"})
  texts = text_tools.read_texts(file)
  found = detected(texts)
  assert found.z[0] > 10
  assert found.p_value[0] < 1e-6
  assert (found.z[1:] < 4).all()
  assert found.scored[0] == found.green[0] > 40
  assert found.scored[2] == len("some words of mine") - 1  # without the tokenizer's own token
  for i, text in enumerate(texts):  # padding changes nothing
    alone = detected([text])
    np.testing.assert_allclose([x[0] for x in alone], [x[i] for x in found], rtol=1e-6)
  monkeypatch.setattr(text_tools, "_TABLE", 0)  # row by row, as of large vocabularies
  np.testing.assert_allclose(detected(texts, gamma=0.25).z, found.z)
  assert detected(texts[:1], key=1).z[0] < 4


def test_perplexity_of_texts(tmp_path):
  loaded = load_causal_lm(MODEL)
  file = written(tmp_path, {"ids": marked(20)}, {"ids": marked(9, 1)}, {"ids": marked(12, 2)})
  texts = text_tools.read_texts(file)
  tokens = text_tools.tokens_of(texts, None, VOCABULARY)
  measure = lambda chunk, these=slice(None): text_tools.perplexities(
    texts[these], tokens[these], loaded, window=4, chunk=chunk
  )
  whole = measure(2)
  assert (whole.window >= whole.mean - 1e-6).all()
  assert abs(whole.mean - np.log(VOCABULARY)).max() < 0.5  # weights are random and small
  np.testing.assert_allclose(whole, measure(3), rtol=1e-5)
  np.testing.assert_allclose([x[1:2] for x in whole], measure(1, slice(1, 2)), rtol=1e-5)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
  file = tmp_path / "text.txt"
  file.write_bytes("Käse, 12 €\n".encode(encoding))
  assert text_tools.read_texts(file) == [Text(str(file), "Käse, 12 €\n")]


def test_bad_files(tmp_path):
  file = tmp_path / "text.txt"
  for raw, message in (
    ("Käse".encode("latin-1"), "byte 1 is no utf-8: expected UTF-8, or UTF-16"),
    (b"", "there is no text"),
    ("\ufeff \n".encode(), "there is no text"),
  ):
    file.write_bytes(raw)
    with pytest.raises(InputError, match=message) as error:
      text_tools.read_texts(file)
    assert "\n" not in str(error.value)
  with pytest.raises(InputError, match="cannot be read: No such file"):
    text_tools.read_texts(tmp_path / "absent.txt")
  for line in (7, {"ids": ["a"]}, {"words": "x"}):
    with pytest.raises(InputError, match=r'line 1: expected a string, \{"text"'):
      text_tools.read_texts(written(tmp_path, line))
  with pytest.raises(InputError, match="there is no text"):
    text_tools.read_texts(written(tmp_path))


def test_texts_that_cannot_be_tested():
  short, known = Text("a.txt", "a"), Text("b.txt", "abcdef")
  with pytest.raises(InputError, match=r"a.txt: 1 token, a watermark needs a pair"):
    detected([known, short])
  with pytest.raises(InputError, match="must be a number of 32 bits, 0 to 4294967295"):
    detected([known], key=2**32)
  with pytest.raises(InputError, match="name the model whose tokenizer wrote it"):
    text_tools.tokens_of([known], None, VOCABULARY)
  with pytest.raises(InputError, match="token 50 is outside the vocabulary of 50"):
    text_tools.tokens_of([Text("c", "", (3, 50))], None, VOCABULARY)
  loaded = load_causal_lm(MODEL)
  for ids, message in (
    ((1,) * 4, "4 tokens, a window of 4 needs 5"),
    ((1,) * 65, "context has 64"),
  ):
    text = Text("d.jsonl, line 2", "", ids)
    with pytest.raises(InputError, match=f"d.jsonl, line 2: .*{message}"):
      text_tools.perplexities([text], [np.array(ids)], loaded, window=4, chunk=1)
