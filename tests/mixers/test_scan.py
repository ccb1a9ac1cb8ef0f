"""The three forms of each recurrence agree with each other and with ONNX Runtime's kernel."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from compress.mixers.scan import chunked, naive, step
from compress.mixers.spec import UpdateRule

RULES: tuple[UpdateRule, ...] = ("linear", "gated", "delta", "gated_delta")
B, K, V = 2, 8, 9
each_rule = pytest.mark.parametrize("rule", RULES)


class Inputs(NamedTuple):
    """What a scan takes."""

    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTGV: Tensor
    log_decay_BTG: Tensor | None
    beta_BTG: Tensor | None
    state_BGKV: Tensor | None

    def map(self, change: Any) -> Inputs:
        return Inputs(*(None if part is None else change(part) for part in self))

    def tokens(self, start: int, stop: int, state_BGKV: Tensor | None) -> Inputs:
        return self.map(lambda part: part[:, start:stop])._replace(state_BGKV=state_BGKV)


def draw(
    rule: UpdateRule, length: int, groups: int = 2, repeats: int = 3, seed: int = 0, strongest: float = 0.3
) -> Inputs:
    """Random inputs; log decays are of all sizes from `strongest` down."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    unit = torch.nn.functional.normalize
    decay = -strongest * torch.rand(B, length, groups, generator=source).pow(4)
    beta = torch.rand(B, length, groups, generator=source)
    return Inputs(
        unit(normal(B, length, groups * repeats, K), dim=-1),
        unit(normal(B, length, groups, K), dim=-1),
        normal(B, length, groups, V),
        decay if rule.startswith("gated") else None,
        beta if rule.endswith("delta") else None,
        normal(B, groups, K, V),
    )


def assert_near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], bound: float = 1e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype == torch.float32
        assert (mine - other).abs().max() <= bound * max(1.0, float(other.abs().max()))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RULES),
    length=st.integers(1, 40),
    chunk_size=st.sampled_from([1, 2, 7, 8, 16, 64]),
    groups=st.sampled_from([1, 3]),
    repeats=st.sampled_from([1, 3, 8]),
    strongest=st.sampled_from([0.0, 0.1, 5.0, 300.0]),
    packed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_naive_chunked_and_step_agree_across_a_resumed_state(
    rule: UpdateRule, length: int, chunk_size: int, groups: int, repeats: int, strongest: float, packed: bool, seed: int
) -> None:
    inputs = draw(rule, length, groups, repeats, seed, strongest)
    starts = torch.rand(B, length, generator=torch.Generator().manual_seed(seed)) < 0.1 if packed else None
    expected = naive(*inputs, rule=rule, segment_start_BT=starts)
    whole = chunked(*inputs, rule=rule, segment_start_BT=starts, chunk_size=chunk_size)
    assert_near(whole, expected)

    cut = seed % (length + 1)
    outputs, state = [], inputs.state_BGKV
    if cut:
        first = inputs.tokens(0, cut, state)
        output, state = chunked(
            *first, rule=rule, segment_start_BT=None if starts is None else starts[:, :cut], chunk_size=chunk_size
        )
        outputs.append(output)
    for t in range(cut, length):
        now = None if starts is None else starts[:, t : t + 1]
        output, state = step(*inputs.tokens(t, t + 1, state), rule=rule, segment_start_B1=now)
        outputs.append(output)
    assert state is not None
    assert_near((torch.cat(outputs, 1), state), expected)


@each_rule
@pytest.mark.parametrize("length", [1, 63, 64, 65, 3 * 64 + 5])
def test_any_length_at_the_default_chunk_size(rule: UpdateRule, length: int) -> None:
    inputs = draw(rule, length)._replace(state_BGKV=None)
    assert_near(chunked(*inputs, rule=rule), naive(*inputs, rule=rule))


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_strong_decays_neither_overflow_nor_blur_the_weak_ones(rule: UpdateRule) -> None:
    inputs = draw(rule, 130)
    assert inputs.log_decay_BTG is not None
    inputs.log_decay_BTG[:, ::5] = -1e4
    inputs.log_decay_BTG[:, 7] = -torch.inf
    leaves = inputs.map(lambda part: part.clone().requires_grad_())
    found = chunked(*leaves, rule=rule)
    assert_near(found, naive(*inputs, rule=rule))
    found[0].square().sum().backward()
    gradients = [leaf.grad for leaf in leaves if leaf is not None]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@each_rule
def test_gradients_of_chunked_are_those_of_naive(rule: UpdateRule) -> None:
    inputs = draw(rule, 37)
    weight = torch.randn(B, 37, 6, V, generator=torch.Generator().manual_seed(1))
    gradients = []
    for form in (naive, lambda *parts, rule: chunked(*parts, rule=rule, chunk_size=16)):
        leaves = inputs.map(lambda part: part.clone().requires_grad_())
        output, state = form(*leaves, rule=rule)
        loss = (output * weight).sum() + state.square().sum()
        gradients.append(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
    assert_near(gradients[1], gradients[0])


@each_rule
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_are_scanned_in_float32(rule: UpdateRule, autocast: bool) -> None:
    half = draw(rule, 70).map(lambda part: part.bfloat16())
    expected = naive(*half.map(lambda part: part.float()), rule=rule)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_near(chunked(*half, rule=rule, chunk_size=16), expected)
        assert_near(naive(*half, rule=rule), expected)


@each_rule
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_state_as_it_is(rule: UpdateRule, side: str) -> None:
    inputs = draw(rule, 40)
    valid = slice(23, 40) if side == "left" else slice(0, 17)
    mask = torch.zeros(40)
    mask[valid] = 1
    padded = inputs._replace(
        k_BTGK=inputs.k_BTGK * mask[:, None, None],
        log_decay_BTG=None if inputs.log_decay_BTG is None else inputs.log_decay_BTG * mask[:, None],
        beta_BTG=None if inputs.beta_BTG is None else inputs.beta_BTG * mask[:, None],
    )
    output, state = chunked(*padded, rule=rule, chunk_size=16)
    expected = naive(*inputs.tokens(valid.start, valid.stop, inputs.state_BGKV), rule=rule)
    assert_near((output[:, valid], state), expected)


@each_rule
def test_packed_documents_are_separate_runs(rule: UpdateRule) -> None:
    inputs = draw(rule, 50)
    bounds = [0, 5, 16, 17, 50]  # at a chunk's edge, inside one, and one of a single token
    starts = torch.zeros(B, 50, dtype=torch.bool)
    starts[:, bounds[:-1]] = True
    output, state = chunked(*inputs, rule=rule, segment_start_BT=starts, chunk_size=16)
    runs = [naive(*inputs.tokens(a, b, None), rule=rule) for a, b in pairwise(bounds)]
    assert_near((output, state), (torch.cat([run[0] for run in runs], 1), runs[-1][1]))


def test_query_head_h_reads_key_value_head_h_over_r() -> None:
    inputs = draw("linear", 20, groups=2, repeats=3)._replace(state_BGKV=None)
    lower = torch.ones(20, 20).tril()

    def quadratic(k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
        scores = torch.einsum("bihk,bjhk->bhij", inputs.q_BTHK, k_BTHK) * lower
        return torch.einsum("bhij,bjhv->bihv", scores, v_BTHV)

    k, v = inputs.k_BTGK, inputs.v_BTGV
    output = chunked(*inputs, rule="linear", chunk_size=8)[0]
    assert_near((output,), (quadratic(k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)),))
    assert (output - quadratic(k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1))).abs().max() > 0.1


@each_rule
@pytest.mark.parametrize(("groups", "repeats"), [(3, 3), (2, 1), (1, 4)])
def test_onnx_runtime_computes_the_same(rule: UpdateRule, groups: int, repeats: int) -> None:
    inputs = draw(rule, 21, groups, repeats)
    q, k, v, log_decay, beta, state = inputs
    named = {"q": q.flatten(2), "k": k.flatten(2), "v": v.flatten(2), "s": state, "g": log_decay, "b": beta}
    feeds = {name: part.numpy() for name, part in named.items() if part is not None}
    node = helper.make_node(
        "LinearAttention", [name if name in feeds else "" for name in named], ["y", "after"], domain="com.microsoft",
        q_num_heads=groups * repeats, kv_num_heads=groups, update_rule=rule, scale=1.0,
    )  # fmt: skip
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, part.shape) for name, part in feeds.items()}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "after")]
    graph = helper.make_graph([node], "graph", list(values.values()), outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    theirs = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
    ours = chunked(*inputs, rule=rule, chunk_size=8)
    output = np.asarray(theirs[0]).reshape(ours[0].shape)
    assert_near(ours, (torch.from_numpy(output), torch.from_numpy(theirs[1])))


@each_rule
def test_what_autograd_keeps_grows_linearly(rule: UpdateRule) -> None:
    def kept_bytes(length: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaves = draw(rule, length).map(lambda part: part.requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _outputs = chunked(*leaves, rule=rule, chunk_size=16)
        return sum(kept.values())

    assert kept_bytes(1024) < 2.1 * kept_bytes(512)


def test_a_rule_takes_exactly_what_it_uses() -> None:
    q, k, v, log_decay, beta, state = draw("gated_delta", 3)
    for rule, rates in (("linear", (log_decay, None)), ("gated", (None, None)), ("delta", (log_decay, beta))):
        with pytest.raises(ValueError, match=rule):
            chunked(q, k, v, *rates, state, rule=rule)  # type: ignore[arg-type]
