"""Rotated queries and keys as the features of a linear-time mixer.

Shapes: B rows, T new tokens, N = H + G heads, those of queries first, D head size, K features of a head.
"""

from __future__ import annotations

import numpy as np

from compress.exports.onnx.attention import PlainInputs, rotate
from compress.exports.onnx.blocks import Blocks
from compress.mixers.spec import FeatureMap

EPSILON = 1e-6
"""What is added to the square of a length."""

Rotary = tuple[str, str, str] | PlainInputs
"""The positions `(B, T)`, cosines and sines that `RotaryEmbedding` takes; or cosines and sines for `rotate`, by token
`(B, T, 1, rotary_dim)`."""


def rotated(blocks: Blocks, qk: str, num_heads: int, rotary: Rotary) -> str:
    """[q; k] `(B, T, N·D)` of N heads turned by their positions."""
    graph, shape = blocks.graph, blocks.model.shape
    if isinstance(rotary, PlainInputs):
        heads_BTND = graph.op("Reshape", qk, graph.ints(0, 0, num_heads, shape.head_dim))
        return graph.op("Reshape", rotate(blocks, heads_BTND, rotary), graph.ints(0, 0, -1))
    assert blocks.model.rotary is not None
    width = 2 * blocks.model.rotary[0].shape[1]
    partly = {"rotary_embedding_dim": width} if width != shape.head_dim else {}
    return graph.fused("RotaryEmbedding", qk, *rotary, num_heads=num_heads, interleaved=0, **partly)


def features(blocks: Blocks, qk: str, num_heads: int, kind: FeatureMap, path: str, packed: str) -> str:
    """Rotated [q; k] `(B, T, N·D)` → `(B, T, N·K)`. path: of the mixer, with its dot. packed: int64 [B, T, −1]."""
    graph = blocks.graph
    heads_XND = graph.op("Reshape", qk, graph.ints(-1, num_heads, blocks.model.shape.head_dim))
    return graph.op("Reshape", _map(blocks, heads_XND, kind, path), packed)


def _map(blocks: Blocks, x: str, kind: FeatureMap, path: str) -> str:
    """φ of heads, `(X, N, D)` → `(X, N, K)` with X = B·T."""
    graph, head_dim = blocks.graph, blocks.model.shape.head_dim
    if kind == "l2":  # x/√(Σx² + ε) is the root mean square norm with ε/D and the weight 1/√D
        unit = graph.constant("unit", np.full(head_dim, head_dim**-0.5, np.float32))
        return blocks.rms_norm(x, unit, EPSILON / head_dim)
    if kind == "hedgehog":
        weight_NDD = np.concatenate([blocks.model.vector(f"{path}feature_map_{part}.weight") for part in "qk"])
        weight = graph.weight(f"{path}feature_map.weight", weight_NDD.transpose(0, 2, 1))
        if blocks.fused:
            x_NXD = graph.fused("FusedMatMul", x, weight, transBatchA=1)
        else:
            x_NXD = graph.op("MatMul", graph.op("Transpose", x, perm=(1, 0, 2)), weight)
        return of_both_signs(blocks, graph.op("Transpose", x_NXD, perm=(1, 0, 2)))
    return graph.op("Softmax", x, axis=-1)


def of_both_signs(blocks: Blocks, x: str) -> str:
    """Hedgehog's softmax([x, −x]) of x = Wh, `(…, D)` → `(…, 2D)`; [W, −W] would be twice the bytes to read a step."""
    graph = blocks.graph
    return graph.op("Softmax", graph.op("Concat", x, graph.op("Neg", x), axis=-1), axis=-1)
