"""Running what the pipeline exports: one ONNX Runtime session for parity, evaluation and latency."""
