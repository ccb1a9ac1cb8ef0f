"""What the installed ONNX Runtime has kernels for on the CPU, found out by opening a graph of one node."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import onnx
import onnx.parser

from compress.errors import Problem
from compress.exports.onnx.graph import as_model
from compress.quant.schemes import Scheme

_PROBES = {
    "LinearAttention": """(float[1,1,8] q, float[1,1,8] k, float[1,1,8] v, float[1,1,8,8] past)
        => (float[1,1,8] out, float[1,1,8,8] present)
        { out, present = com.microsoft.LinearAttention <q_num_heads = 1, kv_num_heads = 1, update_rule = "linear">
                         (q, k, v, past) }""",
    "CausalConvWithState": """(float[1,8,1] x, float[8,1,4] weight, float[8] bias, float[1,8,3] past)
        => (float[1,8,1] out, float[1,8,3] present)
        { out, present = com.microsoft.CausalConvWithState (x, weight, bias, past) }""",
    "Attention": """(float[1,1,8] q, float[1,2,8] k, float[1,2,9] v, float[1,1,1,2] bias) => (float[1,1,9] out)
        { out = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, v, bias) }""",
    "DynamicQuantizeMatMul": """(float[1,16] x, int8[16,8] codes, float[8] scales) => (float[1,8] out)
        { out = com.microsoft.DynamicQuantizeMatMul (x, codes, scales) }""",
    "GroupQueryAttention with an int8 cache": """(float[1,1,8] q, float[1,1,8] k, float[1,1,8] v, int8[1,1,0,8] past_k,
        int8[1,1,0,8] past_v, int32[1] last, int32 total, float[1,1,1,8] k_scale, float[1,1,1,8] v_scale)
        => (float[1,1,8] out, int8[1,1,1,8] present_k, int8[1,1,1,8] present_v)
        { out, present_k, present_v = com.microsoft.GroupQueryAttention
            <num_heads = 1, kv_num_heads = 1, k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL",
             kv_cache_bit_width = 8> (q, k, v, past_k, past_v, last, total, , , , , , k_scale, v_scale) }""",
}
_N_BITS = """(float[1,{k}] x, uint8[8,1,{bytes}] codes, float[8,1] scales) => (float[1,8] out)
    {{ out = com.microsoft.MatMulNBits <K = {k}, N = 8, bits = {bits}, block_size = {k}, accuracy_level = 4>
             (x, codes, scales) }}"""
_GATHER = """(uint8[8,{bytes}] codes, int64[1] ids, float[8,1] scales) => (float[1,{k}] out)
    {{ out = com.microsoft.GatherBlockQuantized <bits = {bits}, block_size = {k}, gather_axis = 0, quantize_axis = 1>
             (codes, ids, scales) }}"""
WINDOW = "Attention"
INT8_CACHE = "GroupQueryAttention with an int8 cache"


def missing(names: Iterable[str]) -> tuple[str, ...]:
    """Which of the operators that have a name here the installed ONNX Runtime has no CPU kernel for."""
    return tuple(name for name in names if not _runs(_PROBES[name]))


def missing_for(scheme: Scheme, *, is_table: bool = False) -> str:
    """The operator, and what of it, that ONNX Runtime lacks for weights of `scheme`; `""` where it has all.

    is_table: they are gathered, and multiplied perhaps.
    """
    if not scheme.blockwise:
        return "DynamicQuantizeMatMul" if scheme.dynamic and missing(["DynamicQuantizeMatMul"]) else ""
    sizes = {"bits": scheme.bits, "k": scheme.block_size, "bytes": scheme.block_size * scheme.bits // 8}
    wanted = {"MatMulNBits": _N_BITS} | ({"GatherBlockQuantized": _GATHER} if is_table else {})
    lacking = next((kind for kind, probe in wanted.items() if not _runs(probe.format(**sizes))), "")
    return lacking and f"{lacking} of {scheme.bits} bits in blocks of {scheme.block_size}"


def lacking(option: str, operator: str, fix: str) -> Problem:
    """What to tell the user of an operator that is missing."""
    import onnxruntime

    return Problem(option, f"ONNX Runtime {onnxruntime.__version__} has no {operator}", fix)


@cache
def _runs(probe: str) -> bool:
    """Whether a session of a graph of one node, in ONNX's textual form, opens."""
    import onnxruntime

    from compress.runtime.ort import ort_errors

    model = as_model(onnx.parser.parse_graph(f"probe {probe}"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ort_errors():
        return False
    return True
