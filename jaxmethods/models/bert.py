"""BERT encoder, and the sentence embedding of MiniLM and its relatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmethods.errors import InputError
from jaxmethods.models.hugging_face import (
  dense,
  encoder_config,
  encoder_rules,
  family,
  norm,
  rooted,
  setting,
)
from jaxmethods.models.probe import masked_mean
from jaxmethods.models.transformer import (
  Encoded,
  Encoder,
  EncoderConfig,
  layer_norm,
  normalise,
)
from jaxmethods.models.weights import Rule
from jaxmethods.trees import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
  """Shape of a BERT encoder.

  Attributes:
    encoder: its blocks.
    vocabulary: number of token ids.
    context: longest text in tokens.
    types: number of token types.
    pooler: whether the file holds a pooler: a dense layer on the first token that sentence
      embeddings do not read. It is kept so that an exported file is complete.
  """

  encoder: EncoderConfig
  vocabulary: int
  context: int
  types: int = 2
  pooler: bool = False

  @classmethod
  def from_hugging_face(cls, config: Json, *, pooler: bool = False, **encoder: Any) -> BertConfig:
    """Reads the config of a BertModel; `encoder`: how to compute, as in `EncoderConfig`.

    Raises:
      InputError: another family, relative positions, or a key is missing.
    """
    family(config, "bert")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
      raise InputError(f"position_embedding_type: only 'absolute' can be read, got {positions!r}")
    return cls(
      encoder=encoder_config(config, norm="post", **encoder),
      vocabulary=setting(config, "vocab_size"),
      context=setting(config, "max_position_embeddings"),
      types=setting(config, "type_vocab_size"),
      pooler=pooler,
    )


class Bert(nn.Module):
  """Word, position and type embeddings, a norm, post-norm blocks.

  >>> from jaxmethods.models.transformer import EncoderConfig
  >>> encoder = EncoderConfig(width=8, num_layers=1, heads=2, hidden=16, norm="post")
  >>> model = jm.models.Bert(jm.models.BertConfig(encoder=encoder, vocabulary=11, context=6))
  >>> model.init_with_output(key, jnp.zeros((1, 5), int))[0].hidden.shape
  (1, 5, 8)
  """

  config: BertConfig

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
    words: jax.Array | None = None,
    **hooks: Any,
  ) -> Encoded:
    """Encodes texts.

    Args:
      ids: token ids (B, T).
      mask: (B, T), nonzero at real tokens; None: all are.
      types: token types (B, T); None: all 0.
      words: word embeddings (B, T, D) in place of those of `ids`: prompts may stand for words.
      **hooks: keywords of `Encoder.__call__`.

    Returns:
      Hidden states (B, T, D), free of meaning where `mask` is 0.
    """
    config, length = self.config, ids.shape[1]
    if length > config.context:
      raise ValueError(f"text of {length} tokens: the model reads at most {config.context}")
    width, dtype = config.encoder.width, config.encoder.dtype
    embed = lambda size, name: nn.Embed(
      size, width, dtype=dtype, embedding_init=nn.initializers.normal(0.02), name=name
    )
    known = embed(config.vocabulary, "word")(ids)
    x = known if words is None else words.astype(known.dtype)
    x = x + embed(config.types, "type")(jnp.zeros_like(ids) if types is None else types)
    x = x + embed(config.context, "position")(jnp.arange(length))
    x = layer_norm(config.encoder, "norm")(x)
    visible = None if mask is None else mask.astype(bool)[:, None, :]
    encoded = Encoder(config.encoder, name="encoder")(x, visible, **hooks)
    if config.pooler and self.is_initializing():
      nn.Dense(width, dtype=dtype, name="pooler")(encoded.hidden[:, 0])
    return encoded


def sentence_embedding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
  """Embeds texts as MiniLM does: the mean over the real tokens, scaled to length 1.

  Args:
    hidden: (B, T, D), what `Bert` returns.
    mask: (B, T), nonzero at real tokens.

  Returns:
    (B, D); zero for a text without tokens.
  """
  return normalise(masked_mean(mask)(hidden))


# With or without the prefix of a model that has a head.
BERT_TABLE = rooted(
  (
    Rule("embeddings.word_embeddings.weight", "word/embedding"),
    Rule("embeddings.position_embeddings.weight", "position/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "type/embedding"),
    *norm("norm", "embeddings.LayerNorm"),
    *encoder_rules(
      {
        "attention/query": ("encoder.layer.{i}.attention.self.query",),
        "attention/key": ("encoder.layer.{i}.attention.self.key",),
        "attention/value": ("encoder.layer.{i}.attention.self.value",),
        "attention/out": ("encoder.layer.{i}.attention.output.dense",),
        "norm_1": ("encoder.layer.{i}.attention.output.LayerNorm",),
        "mlp/fc_1": ("encoder.layer.{i}.intermediate.dense",),
        "mlp/fc_2": ("encoder.layer.{i}.output.dense",),
        "norm_2": ("encoder.layer.{i}.output.LayerNorm",),
      }
    ),
    *dense("pooler", "pooler.dense"),
  ),
  "",
  "",
  "bert.",
)

# A buffer that old files hold beside the weights.
BERT_IGNORED = ("*embeddings.position_ids",)
