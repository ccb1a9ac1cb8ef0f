"""One declared file takes a pretrained transformer to a smaller, faster, measured ONNX folder."""

__version__ = "0.1.0"
