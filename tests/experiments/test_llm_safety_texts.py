"""The safety room's tools on texts of the user, by the command line."""

import json

import jax
import numpy as np
import pytest

from jaxmethods.experiments.llm_safety.config import Config, rows
from jaxmethods.methods.llm_safety import watermark
from jaxmethods.testbeds.language import toy_world

MODEL = (
  'random:{"model_type": "llama", "vocab_size": 160, "hidden_size": 8, "intermediate_size": 16, '
  '"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}'
)


def lines(file, *texts):
  file.write_text("\ufeff" + "".join(json.dumps({"ids": ids}) + "\n" for ids in texts), "utf-8")
  return file


def marked(count):
  """Ids of the toy world, every one green after the one before."""
  key, config = jax.random.key(Config().watermark.key), Config()
  table = watermark.green_table(key, toy_world.VOCABULARY, config.watermark.gamma)
  draw, ids = np.random.default_rng(0), [1]
  while len(ids) < count:
    ids.append(int(draw.choice(np.flatnonzero(table[ids[-1]]))))
  return ids


def plain(count, seed=1):
  return np.random.default_rng(seed).integers(0, toy_world.VOCABULARY, count).tolist()


@pytest.fixture
def tool(cli):
  return lambda *words: cli("eval.run", "--method", "llm_safety", *words)


def test_watermark_of_a_file(tool, tmp_path):
  file = lines(tmp_path / "texts.jsonl", marked(50), plain(50))
  done = tool("--task", "watermark", "--text", file, "--workdir", tmp_path / "run")
  assert done.returncode == 0, done.stderr
  assert "tokens of the toy world" in done.stdout
  table = (tmp_path / "run" / "texts.md").read_text().splitlines()
  found = [dict(zip(cells(table[-4]), cells(line), strict=True)) for line in table[-2:]]
  assert [row["marked"] for row in found] == ["1", "0"]
  assert float(found[0]["z"]) > 9 > 4 > float(found[1]["z"])
  assert found[0]["text"].endswith("texts.jsonl, line 1")
  metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
  assert metrics["marked"] == 0.5


def cells(line):
  return [cell.strip() for cell in line.strip("|").split("|")]


def test_perplexity_of_a_file(tool, tmp_path):
  file = lines(tmp_path / "texts.jsonl", plain(30), plain(12, 2))
  benign = lines(tmp_path / "benign.jsonl", *(plain(20, seed) for seed in range(3, 9)))
  words = ("--task", "perplexity_filter", "--text", file, "--model", MODEL)
  done = tool(*words, "--benign", benign, "--workdir", tmp_path / "run")
  assert done.returncode == 0, done.stderr
  assert "99 % quantile of 6 texts" in done.stdout
  metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
  assert metrics["blocked"] in (0, 0.5, 1)
  assert abs(metrics["log_perplexity"] - np.log(160)) < 0.5


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      ("--task", "unlearn", "--text", "x"),
      "text: is read with task watermark or perplexity_filter",
    ),
    (("--task", "watermark", "--text", "absent.txt"), "absent.txt: cannot be read: No such file"),
    (("--task", "watermark", "--text", "latin.txt"), "byte 1 is no utf-8"),
    (("--task", "watermark", "--text", "text.txt"), "name the model whose tokenizer wrote it"),
    (("--task", "watermark", "--text", "one.jsonl"), "line 1: 1 token, a watermark needs a pair"),
    (
      ("--task", "watermark", "--text", "ids.jsonl", "--watermark.key", "12345678901"),
      "watermark.key: must be a number of 32 bits",
    ),
    (("--task", "perplexity_filter", "--text", "ids.jsonl"), "model: the filter measures texts"),
    (
      ("--task", "perplexity_filter", "--text", "ids.jsonl", "--model", MODEL),
      "5 tokens, a window of 10 needs 11",
    ),
    (("--benign", "ids.jsonl"), "benign: belongs to a text"),
  ],
)
def test_bad_texts(tool, tmp_path, words, message):
  (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
  (tmp_path / "text.txt").write_text("some words")
  lines(tmp_path / "one.jsonl", [3])
  lines(tmp_path / "ids.jsonl", [3, 4, 5, 6, 7])
  done = tool(*words)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


def test_a_text_has_one_row():
  config = Config(task="perplexity_filter", text="some.txt", model="hf:x")
  assert rows(config) == {"jailbreak": config}
