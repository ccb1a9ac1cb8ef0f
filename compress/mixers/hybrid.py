"""Llama, Mistral, Qwen2 and Qwen3 with mixers in place of the attention of some layers, as transformers models.

`config.json` has two keys for it: `layer_types` says `full_attention`, `sliding_attention` (softmax over the last
`sliding_window` tokens) or `linear_attention` for each layer, and `mixers` what each of the last kind is made of, null
for the others. Imports only torch, transformers and its neighbours: a converted artifact carries a copy.
"""

# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import HybridCache
from .cache_name import CACHE, one_cache
from .mixer import Mixer
from .spec import FULL, LINEAR, SLIDING
from .widths import OwnWidths, widths_fault, widths_of

MASKS: dict[str, Any] = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


class HybridConfig(OwnWidths, PreTrainedConfig):
    """What the configs share: `mixers` and `layer_types` fit each other, and the window stays what the file says."""

    layer_types: list[str] | None = None
    mixers: list[dict[str, Any] | None] | None = None
    sliding_window: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        window = self.sliding_window  # Qwen's configs drop it where `use_sliding_window` is false
        super().__post_init__(**kwargs)
        self.sliding_window = window
        if self.mixers is None:
            self.mixers = [None] * self.num_hidden_layers
        self.layer_types = self.layer_types or [FULL] * self.num_hidden_layers
        linear = [layer_type == LINEAR for layer_type in self.layer_types]
        if linear != [mixer is not None for mixer in self.mixers]:
            raise ValueError(f"mixers must name a mixer for each {LINEAR} of layer_types, and null for the others")
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ValueError(f"layer_types has a {SLIDING}, but sliding_window is not set")
        fault = widths_fault(self.layer_widths, self.num_hidden_layers, linear, True)
        for layer in range(self.num_hidden_layers if self.layer_widths and not fault else 0):
            own = widths_of(self, layer)
            if own.num_attention_heads % own.num_key_value_heads:
                numbers = f"{own.num_attention_heads} heads over {own.num_key_value_heads} key/value heads"
                fault = f"layer_widths[{layer}]: {numbers} can't be shared out"
        if fault:
            raise ValueError(fault)


class Hybrid(PreTrainedModel):
    """What backbones and models with a head share."""

    _supports_flash_attn = False  # its kernels take one window for all layers, where these have several kinds of mask
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _is_stateful = True  # generation that takes tokens back is refused

    def initialize_weights(self) -> None:
        """Random projections, and every mixer's own start. What was loaded stays."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Mixer):
                module.reset_parameters()


class HybridBackbone(Hybrid):
    """A llama-like stack of layers whose attentions are as `config.layer_types` and `config.mixers` say."""

    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        for index, (layer, spec) in enumerate(zip(self.layers, config.mixers or (), strict=True)):
            if config.layer_widths and config.layer_widths[index]:
                _resize(layer, config, index)
            if spec is not None:
                layer.self_attn = Mixer(config, index)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: HybridCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """(B, T) ids or (B, T, hidden) embeddings → the last hidden state (B, T, hidden) and the cache.

        attention_mask (B, S): 0 at padding, on either side, for the S − T tokens in the cache too. position_ids: by
        default each row's own count of tokens that are no padding; where they restart, without a cache or a mask, a
        new document starts that sees nothing of the one before. cache: also by its older name, past_key_values.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = one_cache(cache, past_key_values)
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        starts_BT = None
        if position_ids is not None and attention_mask is None and cache is None:
            starts_BT = document_starts(position_ids.expand(len(x_BTD), -1))
        if cache is None and use_cache and starts_BT is None:
            cache = HybridCache(self.config)
        _check(attention_mask, cache)
        if position_ids is None:
            position_ids = positions(x_BTD, attention_mask, cache)
        rotation = self.rotary_emb(x_BTD, position_ids)
        shared = {"position_ids": position_ids, CACHE: cache}
        seen = {LINEAR: {"padding_mask": attention_mask, "segment_start_BT": starts_BT}}
        for kind in {*self.config.layer_types} - {LINEAR}:
            mask = MASKS[kind](config=self.config, inputs_embeds=x_BTD, attention_mask=attention_mask, **shared)
            seen[kind] = {"attention_mask": mask}
        for layer, kind in zip(self.layers, self.config.layer_types, strict=False):
            x_BTD = layer(x_BTD, position_embeddings=rotation, use_cache=use_cache, **shared, **seen[kind], **kwargs)
        if cache is not None:
            cache.num_tokens += x_BTD.shape[1]
        found: dict[str, Any] = {"last_hidden_state": self.norm(x_BTD), CACHE: cache}
        return BaseModelOutputWithPast(**found)


def _resize(layer: Any, config: HybridConfig, index: int) -> None:
    """Make the layer's attention and MLP anew with its own widths."""
    own, narrow = widths_of(config, index), copy.copy(config)
    narrow.num_attention_heads, narrow.num_key_value_heads = own.num_attention_heads, own.num_key_value_heads
    narrow.intermediate_size, narrow.head_dim = own.intermediate_size, own.head_dim
    layer.self_attn, layer.mlp = type(layer.self_attn)(narrow, index), type(layer.mlp)(narrow)
    layer.self_attn.config = layer.mlp.config = config  # which may change later: how attention is computed, say


def _check(attention_mask: Tensor | None, cache: object) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be (batch, tokens), but has {attention_mask.ndim} dimensions")
    if cache is not None and not isinstance(cache, HybridCache):
        raise TypeError(f"{CACHE} must be a HybridCache(model.config), or none, not {type(cache).__name__}")


def positions(x_BTD: Tensor, attention_mask: Tensor | None, cache: HybridCache | None) -> Tensor:
    """The positions (1 or B, T) of the tokens in `x_BTD` that follow those in the cache; padding does not count.

    Softmax attention needs only differences of positions, which padding leaves alone; feature maps of rotated queries
    and keys need the positions themselves.
    """
    length = x_BTD.shape[1]
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    seen = cache.get_seq_length() if cache is not None else 0
    return torch.arange(seen, seen + length, device=x_BTD.device)[None]


def document_starts(position_ids_BT: Tensor) -> Tensor | None:
    """True (B, T) where a document starts behind another one; None where none does."""
    documents_BT = find_packed_sequence_indices(position_ids_BT)
    return None if documents_BT is None else F.pad(documents_BT.diff() > 0, (1, 0))


class HybridHead(Hybrid, GenerationMixin):
    """A hybrid backbone with the output head of its family."""

    backbone_class: type[PreTrainedModel]

    def __init__(self, config: HybridConfig) -> None:
        PreTrainedModel.__init__(self, config)  # the family's own would build its softmax backbone first
        self.model = self.backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: HybridCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """What the family's own model does, given the cache by either of its names."""
        kwargs |= {"inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache}
        kwargs |= {"logits_to_keep": logits_to_keep, CACHE: one_cache(cache, past_key_values)}
        result: CausalLMOutputWithPast = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        return result

    def generate(
        self, *args: Any, cache: HybridCache | None = None, past_key_values: HybridCache | None = None, **kwargs: Any
    ) -> Any:
        """transformers' own, given the cache by either of its names."""
        given = one_cache(cache, past_key_values)
        own: Any = super()
        return own.generate(*args, **kwargs if given is None else kwargs | {CACHE: given})

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get(CACHE)
        # From 5.24 on transformers feeds a cache of linear layers alone what it has seen once more; ours knows how much
        if CACHE == "cache" and isinstance(cache, HybridCache) and all(cache.is_linear):
            embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
            length = generation_config._mask_length if mask is None else mask.shape[1]
            if embeds is not None:
                model_kwargs["inputs_embeds"] = embeds[:, cache.num_tokens :]
            elif length == input_ids.shape[1]:
                input_ids = input_ids[:, cache.num_tokens :]
        own: Any = super()
        return own._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            own: Any = super()
            own._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        elif generation_config.cache_implementation in (None, "dynamic"):
            model_kwargs[CACHE] = HybridCache(self.config)
        else:
            what = f"cache_implementation {generation_config.cache_implementation!r} has no linear layers"
            raise ValueError(f"{what}: leave it out")


class HybridLlamaConfig(HybridConfig, LlamaConfig):
    model_type = "hybrid_llama"


class HybridMistralConfig(HybridConfig, MistralConfig):
    model_type = "hybrid_mistral"


class HybridQwen2Config(HybridConfig, Qwen2Config):
    model_type = "hybrid_qwen2"


class HybridQwen3Config(HybridConfig, Qwen3Config):
    model_type = "hybrid_qwen3"


class HybridLlamaModel(HybridBackbone, LlamaModel):
    config_class = HybridLlamaConfig


class HybridMistralModel(HybridBackbone, MistralModel):
    config_class = HybridMistralConfig


class HybridQwen2Model(HybridBackbone, Qwen2Model):
    config_class = HybridQwen2Config


class HybridQwen3Model(HybridBackbone, Qwen3Model):
    config_class = HybridQwen3Config


class HybridLlamaForCausalLM(HybridHead, LlamaForCausalLM):
    config_class = HybridLlamaConfig
    backbone_class = HybridLlamaModel


class HybridMistralForCausalLM(HybridHead, MistralForCausalLM):
    config_class = HybridMistralConfig
    backbone_class = HybridMistralModel


class HybridQwen2ForCausalLM(HybridHead, Qwen2ForCausalLM):
    config_class = HybridQwen2Config
    backbone_class = HybridQwen2Model


class HybridQwen3ForCausalLM(HybridHead, Qwen3ForCausalLM):
    config_class = HybridQwen3Config
    backbone_class = HybridQwen3Model


BACKBONES = (HybridLlamaModel, HybridMistralModel, HybridQwen2Model, HybridQwen3Model)
HEADS = (HybridLlamaForCausalLM, HybridMistralForCausalLM, HybridQwen2ForCausalLM, HybridQwen3ForCausalLM)
AUTO_CLASSES = dict.fromkeys(BACKBONES, "AutoModel") | dict.fromkeys(HEADS, "AutoModelForCausalLM")
for _model, _auto in AUTO_CLASSES.items():  # so that save_pretrained copies this code, and names it in `auto_map`
    _config: Any = _model.config_class
    _config.register_for_auto_class()
    _model.register_for_auto_class(_auto)
