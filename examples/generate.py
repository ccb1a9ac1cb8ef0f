"""Generate text with a folder that `export-onnx` wrote: a beginning for your own program, to copy.

    pip install numpy onnxruntime tokenizers
    python generate.py FOLDER "Once upon a time" --max-new-tokens 64

Greedy, one text at a time, on the CPU; the text goes to stdout as it comes, the times to stderr. Any exported decoder
will do: the graph itself says what it keeps of the text, be it keys and values that grow with it or a linear layer's
states of one size, in float32 or int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class Decoder:
    """A decoder's graph and what it keeps of the text that it has read."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # an error, no advice
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # attention's masks make many
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.length = 0
        self.chunk_size = int(self.session.get_modelmeta().custom_metadata_map.get("compress.chunk_size", 0))
        self.cache = {name: _empty(node) for name, node in self.inputs.items() if name.startswith("past")}
        self.presents = [f"present.{name.split('.', 1)[1]}" for name in self.cache]
        if not self.cache:
            raise SystemExit(f"{folder} holds no decoder: its graph has no cache")

    def read(self, ids: list[int]) -> int:
        """Read these token ids, a long prompt in chunks, and return the one that is most likely to come next."""
        chunk = self.chunk_size or len(ids)
        return [self._read(ids[start : start + chunk]) for start in range(0, len(ids), chunk)][-1]

    def _read(self, ids: list[int]) -> int:
        self.length += len(ids)
        feeds = {
            "input_ids": [ids],
            "attention_mask": [[1] * self.length],
            "position_ids": [range(self.length - len(ids), self.length)],
        }
        values = {name: _value(np.array(rows, np.int64)) for name, rows in feeds.items() if name in self.inputs}
        logits, *presents = self.session.run_with_ort_values(["logits", *self.presents], values | self.cache)
        self.cache = dict(zip(self.cache, presents, strict=True))  # handed on as it is, never copied to NumPy
        return int(logits.numpy()[0, -1].argmax())


def generate(decoder: Decoder, prompt: list[int], max_new: int, ends: set[int]) -> Iterator[tuple[int, float]]:
    """The new tokens, each with the seconds that it took; the first one's are those of reading the prompt."""
    ids = prompt
    for _ in range(max_new):
        start = time.perf_counter()
        token = decoder.read(ids)
        yield token, time.perf_counter() - start
        if token in ends:
            return
        ids = [token]


def end_tokens(folder: Path) -> set[int]:
    """The ids that end a text, as the model's configs say."""
    for name in ("generation_config.json", "config.json"):
        ids = json.loads((folder / name).read_text("utf-8")).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def _empty(node: Any) -> Any:
    """What a graph is given for a cache of no tokens: one row, no length where the length is not stated."""
    sizes = [size if isinstance(size, int) else 0 for size in node.shape[1:]]
    return _value(np.zeros((1, *sizes), DTYPES[node.type]))


def _value(array: Any) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)


def main() -> None:
    """Read the command line, generate, and tell the times."""
    parser = argparse.ArgumentParser(description="Generate text with a folder that export-onnx wrote.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
    prompt = tokenizer.encode(given.prompt).ids
    if not prompt:
        parser.error("the prompt holds no tokens")
    decoder, text, seconds = Decoder(given.folder, given.threads), DecodeStream(skip_special_tokens=True), []
    for token, took in generate(decoder, prompt, given.max_new_tokens, end_tokens(given.folder)):
        seconds.append(took)
        print(text.step(tokenizer, token) or "", end="", flush=True)
    print()
    told = f"first token after {seconds[0] * 1e3:.1f} ms ({len(prompt)} in the prompt)" if seconds else "no tokens"
    if rest := seconds[1:]:
        told += f", each of the {len(rest)} after it {sum(rest) / len(rest) * 1e3:.2f} ms"
    print(told, file=sys.stderr)


if __name__ == "__main__":
    main()
