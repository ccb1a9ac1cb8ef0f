"""What is written down of an artifact: its structure exactly, its numbers so that another CPU's can be held to them.

Of a tensor of floats that is the root mean square, the spread (the standard deviation, or half of the root mean
square where that is more: of a norm's weights) and eight values, evenly spaced; of codes how many have each value, and
two small tensors of them whole.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from compress.artifact import Metrics
from compress.registry import stage_class
from golden.cases import CASES, Case
from golden.graphs import graph_of
from golden.models import Workshop, padded_batch
from golden.running import format_of, run

Record = dict[str, Any]
NUM_SAMPLES = 8
NUM_BINS = 16
_LEAST_CODES = 256
"""A tensor of fewer integers is kept as it is."""
_UNTOLD = ("epoch", "runtime", "per_second", "seconds", "total_flos", "parity")
"""What a figure's name has in it where nothing else but the machine or the rounding of its last bits moves it."""
_CODE = "*.py"
"""What a converted model's code is called: how many modules that is does not count."""
_VOLATILE_KEYS = ("transformers_version", "torch_dtype", "_name_or_path")
_CARRIED_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "parity.json", "config.json",
                 "generation_config.json")  # fmt: skip


def record_of(stage: str, workshop: Workshop) -> Record:
    """The whole record of a stage as it is now."""
    cls = stage_class(stage)
    cases = {name: case_record(stage, case, workshop) for name, case in CASES[stage].items()}
    return {"stage": stage, "version": cls.version, "defaults": defaults(cls), "cases": cases}


def defaults(cls: type[BaseModel]) -> Record:
    """What options are where a pipeline leaves them out; as `option: {}` where it opens a group of them."""
    found: Record = {}
    for name, field in cls.model_fields.items():
        value = "required" if field.is_required() else field.get_default(call_default_factory=True)
        found[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        found |= {f"{name}: {{}}": defaults(group) for group in groups(field.annotation)}
    return as_json(found)


def groups(annotation: Any) -> Iterator[type[BaseModel]]:
    """The groups of options that an option may be."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            yield each


def case_record(stage: str, case: Case, workshop: Workshop) -> Record:
    """What becomes of one case."""
    with TemporaryDirectory() as scratch:
        metrics = run(stage, case, workshop, Path(scratch))
        out, given = Path(scratch, "out"), workshop(case.models["input"])
        found = _artifact_record(out, given, metrics)
    formats = {format_of(workshop(name)) for name in case.models.values()}
    has_codes = bool(found.get("codes")) or "quantized" in formats
    return {"options": as_json(case.options), "models": dict(case.models), "has_codes": has_codes, **found}


def _artifact_record(out: Path, given: Path, metrics: Metrics) -> Record:
    names = sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file())
    texts = {name: told(json.loads((out / name).read_text())) for name in names
             if name.endswith(".json") and name not in _CARRIED_JSON}  # fmt: skip
    files = sorted({_CODE if name.endswith(".py") else name for name in names if "tfevents" not in name})
    record = {"files": files, "figures": told(metrics), "json": texts}
    if "config.json" not in names:
        return record
    record["config"] = _changes(_config(given), _config(out))
    if format_of(out) == "onnx":
        graph, arrays = graph_of(out)
        return record | {"graph": graph, **_tensors(arrays), "outputs": _onnx_outputs(out)}
    return record | _tensors(dict(_stored(out))) | {"outputs": _torch_outputs(out)}


def told(value: Any) -> Any:
    """JSON without what tells only of the machine; those figures' names stay, with null."""
    if isinstance(value, Mapping):
        return {str(name): None if any(each in str(name) for each in _UNTOLD) else told(each)
                for name, each in value.items()}  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [told(each) for each in value]
    return significant(value) if isinstance(value, float) else value


def significant(value: float) -> float:
    """To six digits: more would be of one CPU."""
    return float(f"{value:.6g}")


def as_json(value: Any) -> Any:
    """What a reader of the file gets: no tuples."""
    return json.loads(json.dumps(value))


def _config(folder: Path) -> Record:
    loaded = json.loads((folder / "config.json").read_text("utf-8"))
    return {key: value for key, value in loaded.items() if key not in _VOLATILE_KEYS}


def _changes(before: Record, after: Record) -> Record:
    """What `after` says otherwise; null for what it no longer says. A library's new keys are in both."""
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return changed | dict.fromkeys(before.keys() - after.keys())


def _stored(folder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Tensors by name; codes of fewer than 8 bits one by one."""
    from safetensors.torch import load_file

    from compress.quant.qtensor import QTensor
    from compress.quant.store import read_quantized

    if "compress" in str(_config(folder).get("quantization_config")):
        for name, tensor in read_quantized(folder)[1].items():
            if isinstance(tensor, QTensor):
                parts = tensor.pack() | {"codes": tensor.codes.contiguous()}
                yield from ((f"{name}.{part}", each.numpy()) for part, each in parts.items())
            else:
                yield name, tensor.numpy()
    else:
        yield from ((name, tensor.numpy()) for name, tensor in load_file(folder / "model.safetensors").items())


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> Record:
    found = {name: array_record(array) for name, array in sorted(arrays.items())}
    coded = sorted((name for name, each in found.items() if "counts" in each), key=lambda name: arrays[name].size)
    return {"tensors": found, "codes": {name: packed(arrays[name]) for name in coded[:2]}}


def array_record(array: NDArray[Any]) -> Record:
    """Type and shape, and of the values what is told of them."""
    record: Record = {"dtype": str(array.dtype), "shape": list(array.shape)}
    if array.dtype.kind == "f":
        values = array.astype(np.float64).ravel()
        rms, std = float(np.sqrt(np.square(values).mean())), float(values.std())
        samples = values[np.linspace(0, values.size - 1, NUM_SAMPLES).astype(int)]
        return record | told({"rms": rms, "spread": max(std, rms / 2), "samples": samples.tolist()})
    if array.size < _LEAST_CODES:
        return record | {"values": array.ravel().tolist()}
    bins = np.histogram(array, bins=NUM_BINS, range=(int(array.min()), int(array.max()) + 1))[0]
    return record | {"least": int(array.min()), "greatest": int(array.max()), "counts": bins.tolist()}


def packed(codes: NDArray[Any]) -> str:
    """Codes as text."""
    return base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()


def unpacked(text: str) -> NDArray[np.uint8]:
    """What `packed` was given, as bytes."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def _torch_outputs(folder: Path) -> Record:
    import torch

    from compress.quant.load import load_any

    model: Any = load_any(folder)
    is_decoder = hasattr(model, "lm_head")
    ids, mask = padded_batch("left" if is_decoder else "right")
    ids %= model.config.vocab_size
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0]
    return array_record(output.float().numpy()[mask == 1])


def _onnx_outputs(folder: Path) -> Record:
    from compress.runtime.session import OnnxModel

    model = OnnxModel(folder, threads=1)
    ids, mask = padded_batch("left" if not model.shares_cache and model.is_decoder else "right")
    if not model.takes_padding:
        mask = np.ones_like(mask)
    logits = model.forward(ids, mask)[0] if model.is_decoder else next(iter(model.encode(ids, mask).values()))
    return array_record(logits[mask == 1])
