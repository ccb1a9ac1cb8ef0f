"""Linear attention that sees both sides, as ONNX nodes: φ(K)ᵀV and φ(Q)(φ(K)ᵀV) are two MatMuls a head.

Standard operators only. Shapes: B rows, T tokens, H heads, D head size, K features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from compress.exports.onnx.attention import project, split_heads
from compress.exports.onnx.blocks import Blocks
from compress.exports.onnx.features import of_both_signs
from compress.exports.onnx.weights import Model
from compress.mixers.spec import EPSILON
from compress.quant.qtensor import QTensor

if TYPE_CHECKING:
    from torch import Tensor


def fold_feature_maps(model: Model) -> Model:
    """The model with each feature map's W inside the projection before it: W(W_q x + b) = (W W_q) x + W b.

    Only where that projection is float32: codes are stored as they are, and W stays beside them.
    """
    tensors = dict(model.tensors)
    layers = [layer for layer, spec in enumerate(model.mixers) if spec is not None]
    for path, feature_map in (pair for layer in layers for pair in _maps(model, layer)):
        if isinstance(tensors[f"{path}.weight"], QTensor):
            continue
        map_HDD = cast("Tensor", tensors.pop(f"{feature_map}.weight"))
        heads, head_dim, _ = map_HDD.shape
        for name in (f"{path}.weight", f"{path}.bias"):
            tensor = cast("Tensor", tensors[name])
            tensors[name] = (map_HDD @ tensor.view(heads, head_dim, -1)).view(tensor.shape)
    return replace(model, tensors=tensors)


def noncausal_attention(blocks: Blocks, x: str, layer: int, mask_BT1: str) -> str:
    """`(B, T, hidden)` → `(B, T, H·D)`. mask_BT1: float, 0 at padding."""
    graph, shape = blocks.graph, blocks.model.shape.of_layer(layer)
    heads = shape.num_attention_heads
    q, k, v = project(blocks, x, layer, packed=False)
    v = graph.op("Mul", v, mask_BT1)
    q, k = (split_heads(blocks, value, heads) for value in (q, k))
    v = split_heads(blocks, v, heads, shape.v_head_dim)
    (_, map_q), (_, map_k) = _maps(blocks.model, layer)
    q_BHTK, k_BHTK = _features(blocks, q, map_q), _features(blocks, k, map_k)
    k_BHKT = graph.op("Transpose", k_BHTK, perm=(0, 1, 3, 2))
    mask_B1T1 = graph.op("Unsqueeze", mask_BT1, graph.ints(1))
    state_BHKV = graph.op("Concat", graph.op("MatMul", k_BHKT, v), graph.op("MatMul", k_BHKT, mask_B1T1), axis=-1)
    mixed = graph.op("MatMul", q_BHTK, state_BHKV)
    num, den = graph.split(mixed, shape.v_head_dim, 1)
    y_BHTD = graph.op("Div", num, graph.op("Add", den, graph.scalar(EPSILON)))
    return graph.op("Reshape", graph.op("Transpose", y_BHTD, perm=(0, 2, 1, 3)), graph.ints(0, 0, -1))


def _maps(model: Model, layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(projection, feature map after it) of queries and of keys."""
    anatomy = model.shape.family.attention
    q, k = (model.layer(layer, f"{anatomy.path}.{leaf}") for leaf in (anatomy.q, anatomy.k))
    mixer = q.rpartition(".")[0]
    return (q, f"{mixer}.feature_map_q"), (k, f"{mixer}.feature_map_k")


def _features(blocks: Blocks, x_BHTD: str, path: str) -> str:
    """softmax([Wx, −Wx]), `(B, H, T, 2D)`; softmax([x, −x]) where W is folded in."""
    if blocks.model.has(path):
        map_HDD = blocks.model.vector(f"{path}.weight").transpose(0, 2, 1)
        x_BHTD = blocks.graph.op("MatMul", x_BHTD, blocks.graph.weight(f"{path}.weight", map_HDD))
    return of_both_signs(blocks, x_BHTD)
