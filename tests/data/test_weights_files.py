"""Checkpoints in files: shards, bfloat16, GGUF, and files that are broken."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxmethods.data.weights_files import Safetensors, open_gguf, save_checkpoint, split_halves
from jaxmethods.errors import InputError

TENSORS = {
  "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
  "b.weight": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
  "c.bias": np.arange(5, dtype=np.float16),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 40])
def test_saved_and_read_back(tmp_path, shard_bytes):
  save_checkpoint(tmp_path, TENSORS, {"model_type": "llama"}, shard_bytes=shard_bytes)
  assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 40)
  assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama"}
  read = Safetensors(tmp_path)
  assert set(read) == set(TENSORS) and len(read) == len(TENSORS)
  for name, value in TENSORS.items():
    assert read[name].dtype == value.dtype
    assert read[name].tobytes() == value.tobytes()
  assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_truncated_file(tmp_path):
  save_checkpoint(tmp_path, TENSORS, {})
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-3])
  with pytest.raises(InputError, match=r"model\.safetensors: is damaged or cut short"):
    Safetensors(tmp_path)


def test_missing_shard_and_missing_tensor(tmp_path):
  save_checkpoint(tmp_path, TENSORS, {}, shard_bytes=40)
  index = tmp_path / "model.safetensors.index.json"
  contents = json.loads(index.read_text())
  promised = contents["weight_map"] | {"d.weight": contents["weight_map"]["a.weight"]}
  index.write_text(json.dumps({"weight_map": promised}))
  with pytest.raises(InputError, match=r"no tensor d\.weight, which .*index\.json promises"):
    Safetensors(tmp_path)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(InputError, match=r"00002-of-00002\.safetensors: .* missing"):
    Safetensors(tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(InputError, match="no such file or folder"):
    Safetensors(tmp_path / "absent")
  with pytest.raises(InputError, match="holds neither"):
    Safetensors(tmp_path)


def test_split_halves_undoes_interleaved_pairs():
  # Row 2 i + j of a head with interleaved pairs is row 3 j + i of one with halves (head size 6).
  rows = np.array([0, 3, 1, 4, 2, 5])
  two_heads = np.concatenate([rows, rows + 6])[:, None]
  np.testing.assert_array_equal(split_halves(two_heads, 2)[:, 0], np.arange(12))


@pytest.fixture
def gguf_file(tmp_path):
  """A Llama of one layer, with a quantised and a plain matrix."""
  gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
  file = tmp_path / "tiny.gguf"
  writer = gguf.GGUFWriter(file, "llama")
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(64)
  writer.add_block_count(1)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_context_length(128)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(20000.0)
  writer.add_token_list(["a", "b", "c"])
  draw = np.random.default_rng(0).normal
  values = {
    "token_embd.weight": draw(size=(3, 32)).astype(np.float32),
    "blk.0.attn_q.weight": draw(size=(32, 32)).astype(np.float32),
    "blk.0.ffn_up.weight": draw(size=(64, 32)).astype(np.float32),
  }
  for name, value in values.items():
    if name.endswith("ffn_up.weight"):
      quantised = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
      writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return file, values


def test_gguf(gguf_file):
  file, values = gguf_file
  opened = open_gguf(file)
  config = opened.config
  assert config["model_type"] == "llama" and config["head_dim"] == 8
  assert config["num_key_value_heads"] == 2 and config["rms_norm_eps"] == 1e-5
  assert config["rope_theta"] == 20000.0 and config["vocab_size"] == 3
  assert config["tie_word_embeddings"]
  tensors = opened.tensors
  assert set(tensors) == {
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
  }
  np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], values["token_embd.weight"])
  up = values["blk.0.ffn_up.weight"]
  np.testing.assert_allclose(
    tensors["model.layers.0.mlp.up_proj.weight"], up, atol=abs(up).max() / 127
  )
  np.testing.assert_array_equal(
    tensors["model.layers.0.self_attn.q_proj.weight"],
    split_halves(values["blk.0.attn_q.weight"], 4),
  )


def test_broken_gguf(gguf_file, tmp_path):
  file, _ = gguf_file
  cut = tmp_path / "cut.gguf"
  for length in (6, 100, file.stat().st_size - 2000):
    cut.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cut\.gguf: is damaged or cut short"):
      open_gguf(cut)
  with pytest.raises(InputError, match="absent: no such file"):
    open_gguf(tmp_path / "absent")


SHARDED, WHOLE = {"shard_bytes": 40}, {}


@pytest.mark.parametrize("before", [SHARDED, WHOLE, {"shard_bytes": 60}])
@pytest.mark.parametrize("after", [SHARDED, WHOLE])
def test_what_is_read_is_what_was_saved_last(tmp_path, before, after):
  save_checkpoint(tmp_path, {**TENSORS, "old": np.ones(20, np.float32)}, {"old": 1}, **before)
  new = {name: np.asarray(x + 1, x.dtype) for name, x in TENSORS.items()}
  save_checkpoint(tmp_path, new, {}, **after)
  back = dict(Safetensors(tmp_path))
  assert set(back) == set(new)
  for name, tensor in new.items():
    np.testing.assert_array_equal(back[name], tensor)
  # No file of the old one is left for another reader.
  stored = [name for file in tmp_path.glob("*.safetensors") for name in Safetensors(file)]
  assert sorted(stored) == sorted(new)
  assert (tmp_path / "model.safetensors.index.json").exists() == bool(after)
  assert json.loads((tmp_path / "config.json").read_text()) == {}


@pytest.mark.parametrize(
  "name",
  [
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "special_tokens_map.json", "generation_config.json",
    "pytorch_model.bin", "chat_template.jinja", "preprocessor_config.json",
  ],
)  # fmt: skip
def test_a_folder_with_files_of_another_model_is_refused(tmp_path, name):
  (tmp_path / name).write_text("{}")
  with pytest.raises(InputError, match=f"{name}: would be read as a part of the saved model"):
    save_checkpoint(tmp_path, TENSORS, {})
  assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_model_of_no_folder_owns_the_files_beside_its_config(tmp_path):
  save_checkpoint(tmp_path, TENSORS, {"a": 1})
  (tmp_path / "generation_config.json").write_text("{}")
  save_checkpoint(tmp_path, TENSORS, {"a": 1})
  with pytest.raises(InputError, match="generation_config"):
    save_checkpoint(tmp_path, TENSORS, {"a": 2})
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(InputError, match="adapter_config"):
    save_checkpoint(tmp_path, TENSORS, {"a": 1})


def test_a_model_keeps_its_own_tokenizer(tmp_path):
  origin, copy = tmp_path / "origin", tmp_path / "copy"
  for folder in (origin, copy):
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    save_checkpoint(folder, TENSORS, {}, origin=origin)
    assert (folder / "tokenizer.json").exists()
  (copy / "tokenizer.json").write_text("{ }")
  with pytest.raises(InputError, match=r"tokenizer\.json"):
    save_checkpoint(copy, TENSORS, {}, origin=origin)
