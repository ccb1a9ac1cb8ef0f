"""What linear layers keep of a sequence, whatever its length.

Named as onnxruntime-genai names them: `recurrent`, and `conv` for the last tokens.
"""

from __future__ import annotations

from compress.exports.onnx.weights import Model
from compress.mixers.spec import MixerSpec


def state_shapes(model: Model, spec: MixerSpec, *, keep_both: bool) -> dict[str, tuple[int, ...]]:
    """The states that one sequence keeps in one layer, by name: `recurrent`, and `conv` where it keeps tokens.

    keep_both: also where it keeps none, as onnxruntime-genai wants it, and of the shape that other layers have; such a
    state is passed on as it is.
    """
    head_dim, num_kv = model.shape.head_dim, model.shape.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"recurrent": (num_kv, spec.key_dim(head_dim), spec.value_dim(head_dim))}
    candidates = [spec, *filter(None, model.mixers)] if keep_both else [spec]
    if keeping := next(filter(keeps_tokens, candidates), None):
        shapes["conv"] = _kept_tokens(model, keeping)
    elif keep_both:
        shapes["conv"] = (1, 1)
    return shapes


def keeps_tokens(spec: MixerSpec) -> bool:
    """Whether a mixer has a `conv` state of its own: the last inputs of a convolution, or what its window holds."""
    return bool(spec.conv_kernel or spec.window)


def _kept_tokens(model: Model, spec: MixerSpec) -> tuple[int, int]:
    """(W, channels of [k; v]) of a window; (channels, K − 1) of the convolution of [q; k; v].

    The denominator's columns are among v's: the convolution passes them on unchanged.
    """
    head_dim, num_kv = model.shape.head_dim, model.shape.num_key_value_heads
    width = spec.window_dim(num_kv, head_dim)
    if spec.window:
        return spec.window, width
    return model.shape.num_attention_heads * head_dim + width, spec.conv_kernel - 1
