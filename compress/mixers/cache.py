"""What a converted model keeps between tokens: keys and values in its softmax layers, constant states in the others.

Imports only torch and transformers: a converted artifact carries a copy.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin


class MixerLayer(LinearAttentionCacheLayerMixin):
    """One mixer's states: recurrent (B, G, d_k, d_v) in float32, and conv (B, channels, kernel − 1) where it has one.

    A mixer with a window keeps that, (B, window, G, D + d_v), as its conv state.

    Unlike transformers' own layer it replaces states instead of overwriting them, so that gradients pass through.
    """

    is_compileable = False
    is_croppable = False

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing is allocated before the first token."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep `conv_states`, the last inputs of the convolution."""
        self.conv_states[state_idx] = conv_states
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep `recurrent_states`."""
        self.recurrent_states[state_idx] = recurrent_states
        self.has_previous_state[state_idx] = True
        return recurrent_states

    def reset(self) -> None:
        """As before the first token."""
        self.conv_states[0] = self.recurrent_states[0] = None
        self.has_previous_state[0] = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._change(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._change(lambda state: state.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states[0] = None if states[0] is None else change(states[0])


class HybridCache(DynamicCache):
    """The cache of a converted model; its `forward` and `generate()` make one where none is given.

    num_tokens: how many each sequence has, padding counted; the model's `forward` counts them.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        pairs = zip(self.is_linear, self.layers, strict=True)
        self.layers = [MixerLayer() if linear else layer for linear, layer in pairs]
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, also where every layer is linear."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the keys that `query_length` more tokens attend to in a layer."""
        if self.is_linear[layer_idx]:
            return self.num_tokens + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def reset(self) -> None:
        """As before the first token."""
        super().reset()
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError where a layer is linear: what a token added to its state can't be taken out again."""
        if any(self.is_linear):
            raise ValueError("a linear layer's state can't forget its last tokens: compute it again from the first one")
        super().crop(tokens_to_remove)
        self.num_tokens = super().get_seq_length()

    @property
    def num_bytes(self) -> int:
        """Bytes that all layers hold now."""
        layers: list[Any] = self.layers
        states = [
            (layer.conv_states[0], layer.recurrent_states[0]) if linear else (layer.keys, layer.values)
            for linear, layer in zip(self.is_linear, layers, strict=True)
        ]
        return sum(state.nbytes for pair in states for state in pair if state is not None)
