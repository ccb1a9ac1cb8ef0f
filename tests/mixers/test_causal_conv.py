"""The convolution with its state is torch's, ONNX Runtime's, and its own in pieces."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from compress.mixers.conv import CausalConv, causal_conv

CHANNELS, TAPS = 6, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 3, 11])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_it_is_torchs_depthwise_convolution(length: int, taps: int) -> None:
    x_BTC, weight_CK, state = random(2, length, CHANNELS), random(CHANNELS, taps, seed=1), random(2, CHANNELS, taps - 1)
    y_BTC, after = causal_conv(x_BTC, weight_CK, state)
    padded = torch.cat([state, x_BTC.mT], 2)
    expected = torch.nn.functional.conv1d(padded, weight_CK.unsqueeze(1), groups=CHANNELS)
    torch.testing.assert_close(y_BTC, expected.mT)
    torch.testing.assert_close(after, padded[:, :, length:])


def test_onnx_runtime_computes_the_same() -> None:
    x_BTC, weight_CK, state = random(2, 11, CHANNELS), random(CHANNELS, TAPS, seed=1), random(2, CHANNELS, TAPS - 1)
    node = helper.make_node("CausalConvWithState", ["x", "w", "", "s"], ["y", "after"], domain="com.microsoft")
    feeds = {"x": x_BTC.mT.contiguous().numpy(), "w": weight_CK.unsqueeze(1).numpy(), "s": state.numpy()}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, part.shape) for name, part in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "after")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y_BCT, after = (torch.from_numpy(part) for part in session.run(None, feeds))
    ours = causal_conv(x_BTC, weight_CK, state)
    torch.testing.assert_close((ours[0], ours[1]), (y_BCT.mT, after), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 5, 10])
def test_pieces_are_the_whole(cut: int) -> None:
    x_BTC, weight_CK = random(2, 11, CHANNELS), random(CHANNELS, TAPS, seed=1)
    whole, last = causal_conv(x_BTC, weight_CK)
    first, state = causal_conv(x_BTC[:, :cut], weight_CK)
    second, after = causal_conv(x_BTC[:, cut:], weight_CK, state)
    torch.testing.assert_close((torch.cat([first, second], 1), after), (whole, last))


def test_no_tap_reaches_into_another_document() -> None:
    x_BTC, weight_CK, state = random(1, 9, CHANNELS), random(CHANNELS, TAPS, seed=1), random(1, CHANNELS, TAPS - 1)
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[:, [0, 5, 6]] = True
    packed = causal_conv(x_BTC, weight_CK, state, segment_start_BT=starts)[0]
    runs = [causal_conv(x_BTC[:, a:b], weight_CK)[0] for a, b in ((0, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(packed, torch.cat(runs, 1))


def test_the_state_ends_at_the_last_valid_token() -> None:
    weight_CK, state = random(CHANNELS, TAPS, seed=1), random(3, CHANNELS, TAPS - 1)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    x_BTC = random(3, 5, CHANNELS) * valid.unsqueeze(-1)
    after = causal_conv(x_BTC, weight_CK, state, valid_BT=valid)[1]
    for row, length in enumerate((3, 5, 0)):
        history = torch.cat([state[row], x_BTC[row, :length].mT], 1)
        torch.testing.assert_close(after[row], history[:, -(TAPS - 1) :])


def test_it_starts_as_the_identity_and_keeps_the_inputs_type() -> None:
    x_BTC = random(2, 7, CHANNELS).bfloat16()
    y_BTC, state = CausalConv(CHANNELS, TAPS)(x_BTC)
    assert torch.equal(y_BTC, x_BTC)
    assert state.dtype == torch.bfloat16
