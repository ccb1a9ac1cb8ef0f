"""One view of any folder with an ONNX model: ours, onnxruntime-genai's builder's or optimum's.

Shapes: B rows, T new tokens, P tokens in the cache, H key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.models.files import stays_inside
from compress.runtime.ort import first_line, open_session, ort_errors

SHARED_CACHE = "compress.past_present_share_buffer"
"""Key of the ONNX model's metadata that says that past and present may be one buffer."""
LOGITS_TO_KEEP = "logits_to_keep"
"""Optional input of our fused decoders: the logits of how many last tokens to compute; 0 is all, left out is 1, or 0
in a graph that was exported with those of all."""
TAKES_PADDING = "compress.right_padded_rows"
"""Key of the ONNX model's metadata that says, where it is 0, that every row must be as long as the others."""
CHUNK_SIZE = "compress.chunk_size"
"""Key of the ONNX model's metadata that says how many tokens of a prompt to read in one call; left out: all."""
GENAI = "genai_config.json"
_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip
_BFLOAT16 = "tensor(bfloat16)"
"""The first two bytes of a float32; numpy has no such type."""
_PAST = re.compile(r"^past.*\.(\d+)\.(key|value|(?:recurrent|conv)(?:_state)?)$")

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class CacheSlot:
    """One cached tensor of one layer: keys or values `(B, H, P, D)`, or a linear layer's state, of one size always.

    sizes: those after the batch's; None where they are the number of tokens. dtype: int8 where they are cached rounded.
    """

    past: str
    present: str
    sizes: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def empty(self, batch_size: int, length: int = 0) -> NDArray[Any]:
        """Zeros for `length` tokens."""
        return np.zeros((batch_size, *(length if size is None else size for size in self.sizes)), self.dtype)


class Past(list[NDArray[Any]]):
    """A cache that is handed on, slot by slot, and how many tokens it has read."""

    def __init__(self, values: Iterable[NDArray[Any]], length: int) -> None:
        super().__init__(values)
        self.length = length


def call_sizes(num_tokens: int, size: int) -> list[int]:
    """So many tokens in calls of `size`, and the rest."""
    return [min(size, num_tokens - start) for start in range(0, num_tokens, size)]


class OnnxModel:
    """A folder's ONNX model in an ONNX Runtime session with `threads` pinned intra-op threads.

    file: the graph's file, where it is not the one that the folder itself names. alone: see `open_session`.
    Raises CompressError for a folder without a model, for a model that ONNX Runtime refuses and for a cache of numbers
    that numpy has not.
    """

    def __init__(
        self, folder: Path, *, threads: int = 2, provider: str = "CPUExecutionProvider", file: str = "",
        alone: bool = False,
    ) -> None:  # fmt: skip
        self.folder = folder
        genai = genai_config(folder)
        decoder = genai.get("model", {}).get("decoder", {})
        self.session = open_session(folder / file if file else graph_file(folder), threads, provider, alone=alone)
        self.inputs: dict[str, Any] = {node.name: node for node in self.session.get_inputs()}
        self.outputs: tuple[str, ...] = tuple(node.name for node in self.session.get_outputs())
        self.keeps_last = LOGITS_TO_KEEP in {node.name for node in self.session.get_overridable_initializers()}
        self.shapes: dict[str, Sequence[Any]] = {node.name: node.shape for node in self.session.get_outputs()}
        self._widens = _BFLOAT16 in {node.type for node in self.session.get_outputs()}
        for name, node in self.inputs.items():
            if _PAST.match(name) and node.type not in _DTYPES:
                what, fix = f"caches {name} as {node.type}, which can't be fed", "export it with a float32 cache"
                raise CompressError(str(folder), what, fix)
        self.cache: tuple[CacheSlot, ...] = _cache_slots(self.inputs, self.outputs, decoder)
        stated = self.session.get_modelmeta().custom_metadata_map
        search = genai.get("search", {})
        shares = bool(search.get("past_present_share_buffer"))
        self.shares_cache: bool = shares or stated.get(SHARED_CACHE) == "1"
        self.takes_padding: bool = stated.get(TAKES_PADDING) != "0"
        self.chunk_size: int = int(search.get("chunk_size") or stated.get(CHUNK_SIZE) or 0)

    @property
    def is_decoder(self) -> bool:
        """Whether it keeps a cache: keys and values, or states."""
        return bool(self.cache)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name for raw inputs by name, bfloat16 as float32.

        Raises CompressError where ONNX Runtime refuses them.
        """
        try:
            if self._widens:  # numpy can't take what session.run would give
                from onnxruntime import OrtValue

                given = {name: OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
                values = self.session.run_with_ort_values(list(self.outputs), given)
                return {name: _copied(value) for name, value in zip(self.outputs, values, strict=True)}
            return dict(zip(self.outputs, self.session.run(None, dict(feeds)), strict=True))
        except ort_errors() as error:
            raise CompressError(str(self.folder), f"ONNX Runtime stopped: {first_line(error)}") from error

    def forward(
        self, input_ids: Ints, attention_mask: Ints | None = None, past: Past | None = None,
        num_logits: int = 0,
    ) -> tuple[Floats, Past]:  # fmt: skip
        """A decoder's logits `(B, T, V)` and its cache after `input_ids` `(B, T)`.

        attention_mask: `(B, P + T)`, ones where left out. past: what the call before returned. num_logits: of so many
        last tokens, where the graph can compute them alone; 0 is all.
        """
        batch_size, num_new = input_ids.shape
        past = past if past is not None else Past((slot.empty(batch_size) for slot in self.cache), 0)
        if attention_mask is None:
            attention_mask = np.ones((batch_size, past.length + num_new), np.int64)
        elif not self.takes_padding and not attention_mask.all():
            what = "can't take rows of different lengths: a convolution's or a window's state would be of the padding"
            raise CompressError(str(self.folder), what, "run the rows one by one, or export it with fused: false")
        feeds = self.token_feeds(input_ids, attention_mask)
        feeds.update({slot.past: value for slot, value in zip(self.cache, past, strict=True)})
        if self.keeps_last:
            feeds[LOGITS_TO_KEEP] = np.array(num_logits, np.int64)
        outputs = self.run(feeds)
        return outputs["logits"], Past((outputs[slot.present] for slot in self.cache), past.length + num_new)

    def in_calls(self, input_ids: Ints, sizes: Iterable[int]) -> Iterator[Floats]:
        """A decoder's logits `(B, size, V)` of each of the calls in which `input_ids` `(B, T)` is read."""
        past: Past | None = None
        start = 0
        for size in sizes:
            logits, past = self.forward(input_ids[:, start : start + size], None, past)
            yield logits
            start += size

    def encode(
        self, input_ids: Ints, attention_mask: Ints | None = None, token_type_ids: Ints | None = None
    ) -> dict[str, NDArray[Any]]:
        """An encoder's outputs by name for `input_ids` `(B, T)`; the mask is ones, the types zeros where left out."""
        feeds = self.token_feeds(input_ids, np.ones_like(input_ids) if attention_mask is None else attention_mask)
        if "token_type_ids" in self.inputs:
            feeds["token_type_ids"] = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.run(feeds)

    def decoder(self, max_length: int, batch_size: int = 1) -> Decoder:
        """A generation session with room for `max_length` tokens a row."""
        return Decoder(self, max_length, batch_size)

    def token_feeds(self, input_ids: Ints, attention_mask: Ints) -> dict[str, NDArray[Any]]:
        """Of `input_ids`, `attention_mask` and the `position_ids` that follow from it, those that the graph takes."""
        feeds: dict[str, NDArray[Any]] = {"input_ids": np.ascontiguousarray(input_ids, np.int64)}
        if "attention_mask" in self.inputs:
            feeds["attention_mask"] = np.ascontiguousarray(attention_mask, np.int64)
        if "position_ids" in self.inputs:
            positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)
            feeds["position_ids"] = np.ascontiguousarray(positions[:, -input_ids.shape[1] :], np.int64)
        return feeds


class Decoder:
    """Token by token generation with bound inputs and outputs; every row is as long as the others.

    Where the graph can write what it caches into the buffer that it reads from, one buffer, of keys and values for
    `max_length` tokens, serves the whole generation; elsewhere each step's cache is handed on without a copy.
    """

    def __init__(self, model: OnnxModel, max_length: int, batch_size: int = 1) -> None:
        if not model.is_decoder:
            raise CompressError(str(model.folder), "has no cache, so it can't generate", "is it a decoder?")
        self.model, self.max_length, self.batch_size = model, max_length, batch_size
        self.length = 0
        self._buffers = [slot.empty(batch_size, max_length) for slot in model.cache] if model.shares_cache else []
        self._carried: list[Any] = []
        self._mask = np.ones(batch_size * max_length, np.int64)
        self._binding = model.session.io_binding()
        self._last = np.array(1, np.int64)
        if model.keeps_last:
            _bind(self._binding.bind_input, LOGITS_TO_KEEP, self._last)
        if self._buffers:  # bound once: two calls a slot and step would be a tenth of a small model's step
            self._bind_cache()

    def prefill(self, input_ids: Ints, chunk: int = 0) -> Floats:
        """Read `input_ids` `(B, T)` or `(T,)`; the logits `(B, V)` after its last token.

        chunk: tokens of one call; 0: as many as the folder says, and all where it says nothing.
        """
        ids_BT = np.atleast_2d(input_ids)
        chunk = chunk or self.model.chunk_size or ids_BT.shape[1]
        return [self._advance(ids_BT[:, start : start + chunk]) for start in range(0, ids_BT.shape[1], chunk)][-1]

    def step(self, token: int | Ints) -> Floats:
        """Read one token a row, `(B,)` or one number; the logits `(B, V)` after it."""
        return self._advance(np.asarray(token, np.int64).reshape(self.batch_size, 1))

    def greedy(self, input_ids: Ints, num_new: int) -> Ints:
        """The `num_new` most likely next tokens of each row, `(B, num_new)`, after `input_ids` `(B, T)`."""
        tokens = [self.prefill(input_ids).argmax(-1)]
        while len(tokens) < num_new:
            tokens.append(self.step(tokens[-1]).argmax(-1))
        return np.stack(tokens, axis=1)

    def _advance(self, input_ids: Ints) -> Floats:
        total = self.length + input_ids.shape[1]
        if total > self.max_length:
            raise ValueError(f"{total} tokens do not fit into the {self.max_length} of this session")
        mask = self._mask[: self.batch_size * total].reshape(self.batch_size, total)
        feeds = self.model.token_feeds(input_ids, mask)
        for name, array in feeds.items():
            _bind(self._binding.bind_input, name, array)
        self._binding.bind_output("logits", "cpu")
        if not self._buffers:
            self._bind_cache()
        try:
            self.model.session.run_with_iobinding(self._binding)
        except ort_errors() as error:
            raise CompressError(str(self.model.folder), f"ONNX Runtime stopped: {first_line(error)}") from error
        self._carried = self._binding.get_outputs()  # in the order in which they were first bound
        logits = self._carried.pop(-1 if self._buffers else 0)
        self.length = total
        return _last_row(logits)

    def _bind_cache(self) -> None:
        binding = self._binding
        for index, slot in enumerate(self.model.cache):
            if self._buffers:
                _bind(binding.bind_input, slot.past, self._buffers[index])
                _bind(binding.bind_output, slot.present, self._buffers[index])
                continue
            if self._carried:
                binding.bind_ortvalue_input(slot.past, self._carried[index])
            else:
                binding.bind_cpu_input(slot.past, slot.empty(self.batch_size))
            binding.bind_output(slot.present, "cpu")


def graph_file(folder: Path) -> Path:
    """The graph that the folder has: the one that its `genai_config.json` names, `model.onnx`, or else the only one.

    Raises CompressError where there is none, or nothing says which it is.
    """
    named = genai_config(folder).get("model", {}).get("decoder", {}).get("filename")
    graphs = sorted(file.name for file in folder.glob("*.onnx"))
    if named or "model.onnx" in graphs or not graphs:
        return folder / (named or "model.onnx")
    if len(graphs) > 1:
        what = f"has {len(graphs)} graphs, and none of them is model.onnx: {', '.join(graphs[:4])}"
        raise CompressError(str(folder), what, "name a folder with one of them, its weights and its configs")
    return folder / graphs[0]


def genai_config(folder: Path) -> dict[str, Any]:
    """The parsed `genai_config.json` of a folder; empty where it has none.

    Raises CompressError for what is no such config, and for one that names a file outside of the folder.
    """
    file = folder / GENAI
    if not file.is_file():
        return {}
    try:
        loaded: Any = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CompressError(str(file), f"is not JSON ({error})", "export the model again") from error
    model = loaded.get("model", {}) if isinstance(loaded, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("decoder", {}), dict):
        raise CompressError(str(file), "has no mapping model.decoder", "export the model again")
    for key, name in _named_files(loaded):
        if not stays_inside(name):
            what = f"names a file outside of its folder: {key}: {name!r}"
            raise CompressError(str(file), what, "put the file into the folder, and name it there")
    config: dict[str, Any] = loaded
    return config


def _named_files(config: Any) -> Iterator[tuple[str, object]]:
    """Every key of a parsed `genai_config.json`, however deep, that names a file, and what it says."""
    if isinstance(config, list):
        for each in config:
            yield from _named_files(each)
    elif isinstance(config, dict):
        for key, value in config.items():
            if re.search(r"file_?(name|path)$", key) and value not in (None, ""):
                yield key, value
            else:
                yield from _named_files(value)


def _cache_slots(inputs: Mapping[str, Any], outputs: Sequence[str], genai: Mapping[str, Any]) -> tuple[CacheSlot, ...]:
    """The cache as the graph declares it; a builder that leaves a size open states it in its `genai_config.json`."""
    slots = []
    for name, node in inputs.items():
        if match := _PAST.match(name):
            present = next(out for out in outputs if re.fullmatch(rf"present.*\.{match[1]}\.{match[2]}", out))
            dtype = np.dtype(_DTYPES[node.type])
            sizes: tuple[int | None, ...] = tuple(node.shape[1:])
            if match[2] in ("key", "value"):
                heads, _, head_dim = (size if isinstance(size, int) else None for size in sizes)
                sizes = heads or int(genai["num_key_value_heads"]), None, head_dim or int(genai["head_size"])
            slots.append(CacheSlot(name, present, sizes, dtype))
    return tuple(slots)


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _last_row(logits: Any) -> Floats:
    """A copy of `(B, V)`, the last position of a runtime's `(B, T, V)` that may be large, without copying that."""
    return _copied(logits, (slice(None), -1))


def _copied(value: Any, part: Any = ...) -> NDArray[Any]:
    """A copy of a runtime's tensor, or of `part` of it; of bfloat16 as float32."""
    is_bfloat16 = value.data_type() == _BFLOAT16
    if not is_bfloat16 and value.data_type() not in _DTYPES:
        return np.array(value.numpy()[part])
    dtype = np.dtype(np.uint16 if is_bfloat16 else _DTYPES[value.data_type()])
    buffer = (ctypes.c_char * (math.prod(value.shape()) * dtype.itemsize)).from_address(value.data_ptr())
    copied: NDArray[Any] = np.frombuffer(buffer, dtype).reshape(value.shape())[part].copy()
    return (copied.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else copied
