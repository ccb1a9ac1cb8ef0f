"""Exports of pico models for tests, plain and quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.quant.choice import SchemeChoice
    from compress.quant.schemes import Scheme


def export(source: Path, out: Path, kind: str = "torch", data: Any = None, **options: Any) -> dict[str, float]:
    """Write the folder `out` of the artifact `source`; the stage's figures."""
    from compress.artifact import Artifact
    from compress.exports.onnx.stage import ExportOnnx
    from compress.stage import StageContext, Target

    out.mkdir(parents=True)
    inputs = {"input": Artifact(source, kind, "test", "key")}  # type: ignore[arg-type]
    context = StageContext(out=out, work=out, inputs=inputs, data=data, seed=0, target=Target(threads=1))
    return dict(ExportOnnx(**options).run(context)["result"])


def quantised(
    source: Path, out: Path, scheme: Scheme, choice: SchemeChoice | None = None, *, reduce_range: Any = "auto"
) -> Path:
    """Write `source` rounded to nearest, by `choice` where that is not `scheme` for all; the folder `out`.

    int8 weights have the range that the stages give them on this CPU: 8 bits overflow where it has no VNNI. What has
    to be the same on every CPU says its `reduce_range`.
    """
    from compress.models.load import load_model
    from compress.models.parts import Parts
    from compress.quant.modules import weight_of
    from compress.quant.options import QuantizeOptions
    from compress.quant.rounding import quantize
    from compress.quant.store import save_quantized
    from compress.quant.targets import all_targets

    out.mkdir()
    if not scheme.blockwise:
        scheme = QuantizeOptions(scheme=scheme.name, reduce_range=reduce_range).base
    model = load_model(source)
    targets = all_targets(Parts(model), choice or scheme)
    tensors = {target.name: quantize(weight_of(target.module), target.scheme) for target in targets}
    if any(tensor.scheme.static for tensor in tensors.values()):
        tensors |= _with_ranges(model, tensors)
    save_quantized(model, tensors, scheme, source, out)
    return out


def _with_ranges(model: Any, tensors: Any) -> dict[str, Any]:
    """The static ones with the range that their activations have on some tokens."""
    from dataclasses import replace

    import torch

    from compress.quant.rounding import activation_range

    found: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda module, inputs: found.update({name: activation_range(inputs[0].min(), inputs[0].max())})

    static = [name for name, tensor in tensors.items() if tensor.scheme.static]
    hooks = [model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(note(name)) for name in static]
    with torch.no_grad():
        model(input_ids=torch.arange(100, 164)[None])
    for hook in hooks:
        hook.remove()
    return {
        name: replace(tensors[name], input_scale=scale, input_zero_point=zero) for name, (scale, zero) in found.items()
    }


def operators(folder: Path) -> list[tuple[str, str]]:
    """(domain, kind) of each node."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [(node.domain, node.op_type) for node in graph.node]


def only_standard(folder: Path) -> bool:
    """Whether neither a node nor an import is of ONNX Runtime's own domain."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {node.domain for node in model.graph.node} == {""} == {opset.domain for opset in model.opset_import}


def optimised(folder: Path, scratch: Path) -> list[str]:
    """The kinds of nodes that ONNX Runtime really runs."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(scratch / "optimised.onnx", load_external_data=False).graph.node
    return [node.op_type for node in nodes]


def rounded(folder: Path) -> dict[str, float]:
    """`parity.json` of the graph that is shipped, activations rounded."""
    record: dict[str, float] = json.loads((folder / "parity.json").read_text())["rounded"]
    return record


def genai_tokens(folder: Path, prompt: Any, num_new: int) -> list[int]:
    """What onnxruntime-genai generates greedily after `prompt` `(1, T)`."""
    import numpy as np
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model := og.Model(str(folder)))
    parameters.set_search_options(max_length=prompt.shape[1] + num_new, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt[0].astype(np.int32))
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
