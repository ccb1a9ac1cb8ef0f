"""What optimum calls the model's task, and the inputs that it would feed an export of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.models.anatomy import shape_of
from compress.models.config import HYBRID
from compress.models.heads import named_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def task_of(model: PreTrainedModel, *, pooled: bool) -> str:
    """optimum's task name: `text-generation-with-past`, `feature-extraction`, `text-classification`, …

    A hybrid model's is that of the transformers class that it extends.
    """
    head = named_head(type(model).__name__)
    assert head is not None, "it was read by the same table"
    return "sentence-similarity" if pooled else head.export


def dummy_inputs(model: PreTrainedModel, task: str) -> dict[str, NDArray[Any]]:
    """optimum's random inputs for one row, for decoders a cache of some tokens and one new one.

    optimum knows no linear layers: a hybrid gets the inputs of the model that it was made from.
    """
    from optimum.utils import DummyPastKeyValuesGenerator, DummyTextInputGenerator, NormalizedConfigManager
    from optimum.utils.input_generators import MistralDummyPastKeyValuesGenerator

    model_type = model.config.model_type.removeprefix(HYBRID)
    config = NormalizedConfigManager.get_normalized_config_class(model_type)(model.config)
    base_task = task.removesuffix("-with-past")
    num_past = 7 if task.endswith("-with-past") else 0
    text = DummyTextInputGenerator(base_task, config, batch_size=1, sequence_length=1 if num_past else 16)
    names = ("input_ids", "position_ids") if num_past else ("input_ids", "attention_mask", "token_type_ids")
    feeds = {name: text.generate(name, framework="np") for name in names}
    feeds.setdefault("attention_mask", np.ones((1, num_past + 1), np.int64))
    if num_past:
        grouped = hasattr(model.config, "num_key_value_heads")
        generator = MistralDummyPastKeyValuesGenerator if grouped else DummyPastKeyValuesGenerator
        cache = generator(base_task, config, batch_size=1, sequence_length=num_past)
        shape = shape_of(model.config.to_dict())
        for layer, pair in enumerate(cache.generate("past_key_values", framework="np")):
            own = shape.of_layer(layer)
            for part, array in zip(("key", "value"), pair, strict=True):
                size = len(array), own.num_key_value_heads, num_past, own.head_dim
                feeds[f"past_key_values.{layer}.{part}"] = np.resize(array, size)
    return feeds
