

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "tanh")
"""transformers' names of the activations that have operators here."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on the length of the text."""
FEW = 8
"""So many new tokens, and fewer, are read by the weights that write: where there are others for prompts."""
_MULTIPLE = 8
"""`GroupQueryAttention` takes tables of multiples of 8 columns."""


def padded_width(half: int) -> int:
    """Columns of the tables that the operator takes for `half` of them."""
    return -(-half // _MULTIPLE) * _MULTIPLE
