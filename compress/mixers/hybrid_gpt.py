"""GPT-2 and GPT-NeoX whose heads have a size of their own and whose layers may differ in width, as transformers models.

`config.json` says so in `head_dim` and `layer_widths`; the families' own classes tie the one to hidden_size and know
nothing of the other. Imports only torch, transformers and its neighbours: a pruned artifact carries a copy.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
)
from transformers.pytorch_utils import Conv1D

from .widths import OwnWidths, widths_fault, widths_of


@contextmanager
def one_head(config: Any) -> Iterator[None]:
    """Within it the config has one head, which divides any width: so a family's own layers can be made, and resized."""
    heads, config.num_attention_heads = config.num_attention_heads, 1
    try:
        yield
    finally:
        config.num_attention_heads = heads


def _check(config: Any) -> None:
    fault = widths_fault(config.layer_widths, config.num_hidden_layers, [False] * config.num_hidden_layers, False)
    if fault:
        raise ValueError(fault)


class HybridGPT2Config(OwnWidths, GPT2Config):
    model_type = "hybrid_gpt2"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)


class HybridGPTNeoXConfig(OwnWidths, GPTNeoXConfig):
    model_type = "hybrid_gpt_neox"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)


class HybridGPT2Model(GPT2Model):
    config_class = HybridGPT2Config

    def __init__(self, config: HybridGPT2Config) -> None:
        with one_head(config):
            super().__init__(config)
        block: Any
        for index, block in enumerate(self.h):
            own, attention, mlp = widths_of(config, index), block.attn, block.mlp
            width = own.num_attention_heads * own.head_dim
            attention.num_heads, attention.head_dim = own.num_attention_heads, own.head_dim
            attention.embed_dim = attention.split_size = width
            attention.scaling = own.head_dim**-0.5 if config.scale_attn_weights else 1.0
            if config.scale_attn_by_inverse_layer_idx:
                attention.scaling /= float(index + 1)
            attention.c_attn = Conv1D(3 * width, config.hidden_size)
            attention.c_proj = Conv1D(config.hidden_size, width)
            mlp.c_fc = Conv1D(own.intermediate_size, config.hidden_size)
            mlp.c_proj = Conv1D(config.hidden_size, own.intermediate_size)
        self.post_init()


class HybridGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = HybridGPT2Config

    def __init__(self, config: HybridGPT2Config) -> None:
        with one_head(config):
            super().__init__(config)
        self.transformer = HybridGPT2Model(config)
        self.post_init()


class HybridGPTNeoXModel(GPTNeoXModel):
    config_class = HybridGPTNeoXConfig

    def __init__(self, config: HybridGPTNeoXConfig) -> None:
        with one_head(config):
            super().__init__(config)
        self.rotary_emb = type(self.rotary_emb)(config=config)
        rope: Any = config.rope_parameters
        rotary_share = rope.get("partial_rotary_factor", 1.0)
        layer: Any
        for index, layer in enumerate(self.layers):
            own, attention, mlp = widths_of(config, index), layer.attention, layer.mlp
            width, biased = own.num_attention_heads * own.head_dim, config.attention_bias
            attention.head_size, attention.scaling = own.head_dim, own.head_dim**-0.5
            attention.rotary_ndims = int(own.head_dim * rotary_share)
            attention.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=biased)
            attention.dense = nn.Linear(width, config.hidden_size, bias=biased)
            mlp.dense_h_to_4h = nn.Linear(config.hidden_size, own.intermediate_size)
            mlp.dense_4h_to_h = nn.Linear(own.intermediate_size, config.hidden_size)
        self.post_init()


class HybridGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    config_class = HybridGPTNeoXConfig

    def __init__(self, config: HybridGPTNeoXConfig) -> None:
        with one_head(config):
            super().__init__(config)
        self.gpt_neox = HybridGPTNeoXModel(config)
        self.post_init()


AUTO_CLASSES: dict[Any, str] = {
    HybridGPT2Model: "AutoModel", HybridGPT2LMHeadModel: "AutoModelForCausalLM",
    HybridGPTNeoXModel: "AutoModel", HybridGPTNeoXForCausalLM: "AutoModelForCausalLM",
}  # fmt: skip
for _model, _auto in AUTO_CLASSES.items():  # so that save_pretrained copies this code, and names it in `auto_map`
    _config: Any = _model.config_class
    _config.register_for_auto_class()
    _model.register_for_auto_class(_auto)
