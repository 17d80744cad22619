"""Flax models, and weights of others."""

from jaxmethods.data.model_sources import load_causal_lm as load_causal_lm
from jaxmethods.models.bert import Bert as Bert, BertConfig as BertConfig
from jaxmethods.models.causal_lm import CausalLM as CausalLM
from jaxmethods.models.causal_lm_config import CausalLMConfig as CausalLMConfig
from jaxmethods.models.clip import CLIP as CLIP, CLIPConfig as CLIPConfig
from jaxmethods.models.convnet import ConvNet as ConvNet
from jaxmethods.models.convnets import classifier as classifier
from jaxmethods.models.denoiser import Denoiser as Denoiser
from jaxmethods.models.gin import GINBackbone as GINBackbone
from jaxmethods.models.mlp import MLP as MLP
from jaxmethods.models.spectral_gnn import SpectralGNN as SpectralGNN
from jaxmethods.models.vit import ViT as ViT, ViTConfig as ViTConfig
