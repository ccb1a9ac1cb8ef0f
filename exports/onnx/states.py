"""What linear layers keep of a sequence, whatever its length.

Named as onnxruntime-genai names them: `recurrent`, and `conv` for the last tokens.
"""

from __future__ import annotations

from compress.exports.onnx.weights import Model
from compress.mixers.spec import MixerSpec


def state_shapes(model: Model, layer: int, *, keep_both: bool) -> dict[str, tuple[int, ...]]:
    """The states that one sequence keeps in a layer, by name: `recurrent`, and `conv` where it keeps tokens.

    keep_both: also where it keeps none, as onnxruntime-genai wants it, and of the shape that other layers have; such a
    state is passed on as it is.
    """
    spec, shape = model.mixers[layer], model.shape.of_layer(layer)
    assert spec is not None
    sizes = shape.num_key_value_heads, spec.key_dim(shape.head_dim), spec.value_dim(shape.v_head_dim)
    shapes: dict[str, tuple[int, ...]] = {"recurrent": sizes}
    candidates = [layer, *range(len(model.mixers))] if keep_both else [layer]
    keeping = (other for other in candidates if (kind := model.mixers[other]) and keeps_tokens(kind))
    if (other := next(keeping, None)) is not None:
        shapes["conv"] = _kept_tokens(model, other)
    elif keep_both:
        shapes["conv"] = (1, 1)
    return shapes


def keeps_tokens(spec: MixerSpec) -> bool:
    """Whether a mixer has a `conv` state of its own: the last inputs of a convolution, or what its window holds."""
    return bool(spec.conv_kernel or spec.window)


def _kept_tokens(model: Model, layer: int) -> tuple[int, int]:
    """(W, channels of [k; v]) of a window; (channels, K − 1) of the convolution of [q; k; v].

    The denominator's columns are among v's: the convolution passes them on unchanged.
    """
    spec, shape = model.mixers[layer], model.shape.of_layer(layer)
    assert spec is not None
    width = spec.window_dim(shape.num_key_value_heads, shape.head_dim, shape.v_head_dim)
    if spec.window:
        return spec.window, width
    return shape.num_attention_heads * shape.head_dim + width, spec.conv_kernel - 1
