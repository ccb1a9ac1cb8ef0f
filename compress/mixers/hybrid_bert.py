"""BERT with linear attention in place of the softmax attention of some layers, as transformers models.

`config.json` says in `mixers` what each layer's mixer is made of, null where softmax attention stays. Imports only
transformers and its neighbours: a converted artifact carries a copy.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from .hybrid_gpt import one_head
from .noncausal import NonCausalMixer
from .widths import OwnWidths, widths_fault, widths_of


class HybridBertConfig(OwnWidths, BertConfig):
    model_type = "hybrid_bert"
    mixers: list[dict[str, Any] | None] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.mixers is None:
            self.mixers = [None] * self.num_hidden_layers
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers has {len(self.mixers)} entries for {self.num_hidden_layers} layers")
        mixed = [mixer is not None for mixer in self.mixers]
        if fault := widths_fault(self.layer_widths, self.num_hidden_layers, mixed, False):
            raise ValueError(fault)
        if self.is_decoder:
            raise ValueError("a BERT that is a decoder has no hybrid form: its mixers would see the tokens to come")


class HybridBertModel(BertModel):
    """The backbone, bare or inside one of the heads."""

    config_class = HybridBertConfig

    def __init__(self, config: HybridBertConfig, add_pooling_layer: bool = True) -> None:
        with one_head(config):
            super().__init__(config, add_pooling_layer)
        layer: Any
        for index, (layer, entry) in enumerate(zip(self.encoder.layer, config.mixers or (), strict=True)):
            _resize(layer, config, index)
            if entry is not None:
                layer.attention.self = NonCausalMixer(config, index)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """BertModel's, with a mask (B, T): 0 at padding, on either side."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), but has {attention_mask.ndim} dimensions")
        return super().forward(input_ids, attention_mask, padding_mask=attention_mask, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NonCausalMixer):
            module.reset_parameters()


def _resize(layer: Any, config: HybridBertConfig, index: int) -> None:
    """Give the layer, which was made with one head, its own widths."""
    own, attention, hidden = widths_of(config, index), layer.attention.self, config.hidden_size
    width = own.num_attention_heads * own.head_dim
    attention.scaling, attention.all_head_size = own.head_dim**-0.5, width
    attention.num_attention_heads, attention.attention_head_size = own.num_attention_heads, own.head_dim
    attention.query, attention.key, attention.value = (nn.Linear(hidden, width) for _ in range(3))
    layer.attention.output.dense = nn.Linear(own.num_attention_heads * own.v_head_dim, hidden)
    layer.intermediate.dense = nn.Linear(hidden, own.intermediate_size)
    layer.output.dense = nn.Linear(own.intermediate_size, hidden)


class HybridBertForMaskedLM(BertForMaskedLM):
    config_class = HybridBertConfig

    def __init__(self, config: HybridBertConfig) -> None:
        with one_head(config):
            super().__init__(config)
        self.bert = HybridBertModel(config, add_pooling_layer=False)
        self.post_init()


class HybridBertForSequenceClassification(BertForSequenceClassification):
    config_class = HybridBertConfig

    def __init__(self, config: HybridBertConfig) -> None:
        with one_head(config):
            super().__init__(config)
        self.bert = HybridBertModel(config)
        self.post_init()


class HybridBertForTokenClassification(BertForTokenClassification):
    config_class = HybridBertConfig

    def __init__(self, config: HybridBertConfig) -> None:
        with one_head(config):
            super().__init__(config)
        self.bert = HybridBertModel(config, add_pooling_layer=False)
        self.post_init()


AUTO_CLASSES: dict[Any, str] = {
    HybridBertModel: "AutoModel",
    HybridBertForMaskedLM: "AutoModelForMaskedLM",
    HybridBertForSequenceClassification: "AutoModelForSequenceClassification",
    HybridBertForTokenClassification: "AutoModelForTokenClassification",
}
HybridBertConfig.register_for_auto_class()
for _model, _auto in AUTO_CLASSES.items():  # so that save_pretrained copies this code, and names it in `auto_map`
    _model.register_for_auto_class(_auto)
