"""The int8 cache of `GroupQueryAttention`: its scales from training text, and what rounding keys and values costs.

Symmetric, a scale for each channel of each head, fixed once for all positions, with room for other text
(benchmarks/results/int8-kv-cache_smollm2-135m.md). Shapes: B rows, T tokens, G key/value heads, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.exports.onnx.exact import FLOAT_CACHE_FILE, write_float_cache
from compress.exports.onnx.weights import CacheScales, Model
from compress.runtime.session import OnnxModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from compress.data.text import TextData

CALIBRATION_TOKENS, LOSS_TOKENS, MAX_LENGTH = 4096, 2048, 256
HEADROOM = 1.5
"""The range over the largest value in the text: what other text has beyond it is clipped, and costs more than steps."""
_STEP = HEADROOM / 127
Ints = NDArray[np.int64]


def text_blocks(data: TextData, tokenizer: PreTrainedTokenizerBase, described: Model) -> tuple[Ints, Ints]:
    """Token ids `(B, T)` to fit the scales to, and held-out ones to measure their loss on."""
    length = min(MAX_LENGTH, described.shape.max_position_embeddings)
    fitted = data.blocks("train", tokenizer, length, CALIBRATION_TOKENS)
    return fitted, data.blocks("eval", tokenizer, length, LOSS_TOKENS)


def cache_scales(model: PreTrainedModel, described: Model, ids_BT: Ints) -> dict[int, CacheScales]:
    """By layer with softmax attention: scales that hold `HEADROOM` times what each channel has in the text."""
    import torch

    from compress.mixers.cache_name import CACHE

    largest: dict[int, list[Tensor]] = {}
    run: Any = model
    for ids_1T in torch.from_numpy(ids_BT[:, None]):
        with torch.inference_mode():
            run(input_ids=ids_1T, use_cache=True, **{CACHE: _watched(described, model.config, largest)})
    return {
        layer: CacheScales(*((part_GD.where(part_GD > 0, 1.0) * _STEP).numpy() for part_GD in parts))
        for layer, parts in largest.items()
    }


def _watched(described: Model, config: PreTrainedConfig, largest: dict[int, list[Tensor]]) -> DynamicCache:
    """An empty cache that notes in `largest` what it is given; a sliding window keeps too little to be asked later."""
    import torch
    from transformers import DynamicCache

    from compress.mixers.cache import HybridCache

    cache: Any = HybridCache(config) if any(described.mixers) else DynamicCache(config=config)
    update = cache.update

    def watch(keys_BGTD: Tensor, values_BGTD: Tensor, layer: int, **given: Any) -> tuple[Tensor, Tensor]:
        found = [part.abs().amax((0, 2)) for part in (keys_BGTD, values_BGTD)]
        largest[layer] = [torch.maximum(*pair) for pair in zip(found, largest.get(layer, found), strict=True)]
        updated: tuple[Tensor, Tensor] = update(keys_BGTD, values_BGTD, layer, **given)
        return updated

    cache.update = watch
    watched: DynamicCache = cache
    return watched


def cache_loss(folder: Path, ids_BT: Ints, threads: int) -> dict[str, float]:
    """What the folder's int8 cache does to its logits on the text, against the same graph with a float32 cache.

    kv_cache_kl: KL(float32‖int8) in nats a token. kv_cache_perplexity: how many times the perplexity grows.
    kv_cache_mb@1024: of one row of 1024 tokens.
    """
    write_float_cache(folder)
    rounded, exact = OnnxModel(folder, threads=threads), OnnxModel(folder, threads=threads, file=FLOAT_CACHE_FILE)
    divergence, loss = [], []
    for ids_1T in ids_BT[:, None]:
        log_q, log_p = (log_softmax(onnx.forward(ids_1T)[0][0, :-1]) for onnx in (rounded, exact))
        divergence.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        loss.append(np.take_along_axis(log_p - log_q, ids_1T[0, 1:, None], axis=-1))
    (folder / FLOAT_CACHE_FILE).unlink()
    size = sum(slot.empty(1, 1024).nbytes for slot in rounded.cache)
    return {
        "kv_cache_kl": float(np.concatenate(divergence).mean()),
        "kv_cache_perplexity": float(np.exp(np.concatenate(loss).mean())),
        "kv_cache_mb@1024": size / 1e6,
    }


def log_softmax(logits_TV: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities in double precision."""
    shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
