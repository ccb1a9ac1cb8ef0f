

FEW = 8
"""So many new tokens, and fewer, are read by the weights that write: where there are others for prompts."""
