"""Linear attention of encoders: the quadratic form, padding, and BERT with it as a transformers model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.mixers.hybrid_bert import HybridBertConfig, HybridBertModel
from compress.mixers.noncausal import NonCausalMixer
from compress.mixers.spec import SPECS
from compress.models.convert import to_hybrid
from compress.models.load import load_model, save_model
from compress.models.parts import Parts
from pico import make_pico

LINEAR = SPECS["linear"]
HEADS = {
    "BertModel": "last_hidden_state",
    "BertForSequenceClassification": "logits",
    "BertForTokenClassification": "logits",
    "BertForMaskedLM": "logits",
}
Pico = Callable[[str], Path]


def make_mixer(hidden: int = 24, heads: int = 3, dtype: torch.dtype = torch.float32) -> NonCausalMixer:
    config = HybridBertConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=1, mixers=[LINEAR.to_json()]
    )
    torch.manual_seed(0)
    mixer = NonCausalMixer(config, 0).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(0, 0.5)
    return mixer


def naive(mixer: NonCausalMixer, x_BTC: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """One weight for each pair of tokens, token by token and head by head, in float64."""
    weights = {name: value.double() for name, value in mixer.state_dict().items()}
    x_BTC = x_BTC.double()

    def features(role: str, part: str) -> list[Tensor]:
        y_BTC = x_BTC @ weights[f"{role}.weight"].T + weights[f"{role}.bias"]
        heads = y_BTC.split(mixer.head_dim, dim=-1)
        maps = weights[f"feature_map_{part}.weight"]
        mapped = [head @ map_DD.T for head, map_DD in zip(heads, maps, strict=True)]
        return [torch.softmax(torch.cat([each, -each], -1), -1) for each in mapped]

    queries, keys = features("query", "q"), features("key", "k")
    values = (x_BTC @ weights["value.weight"].T + weights["value.bias"]).split(mixer.head_dim, dim=-1)
    out = []
    for q, k, v in zip(queries, keys, values, strict=True):
        similarity_BTT = q @ k.transpose(1, 2)
        if padding_mask is not None:
            similarity_BTT = similarity_BTT * padding_mask[:, None, :]
        out.append(similarity_BTT @ v / (similarity_BTT.sum(-1, keepdim=True) + 1e-6))
    return torch.cat(out, -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize(("hidden", "heads"), [(24, 3), (16, 1), (8, 8)])
def test_it_is_the_quadratic_form(hidden: int, heads: int, length: int, dtype: torch.dtype, tolerance: float) -> None:
    mixer = make_mixer(hidden, heads, dtype)
    x_BTC = torch.randn(2, length, hidden, dtype=dtype)
    y_BTC, weights = mixer(x_BTC)
    assert weights is None
    assert y_BTC.dtype == dtype
    torch.testing.assert_close(y_BTC.double(), naive(mixer, x_BTC), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_as_if_it_were_not_there(left: bool) -> None:
    mixer, x_BTC = make_mixer(), torch.randn(3, 11, 24)
    mask_BT = torch.ones(3, 11, dtype=torch.long)
    lengths = (11, 4, 1)
    for row, length in enumerate(lengths):
        mask_BT[row, slice(0, 11 - length) if left else slice(length, None)] = 0
    padded = mixer(x_BTC, padding_mask=mask_BT)[0]
    torch.testing.assert_close(padded.double(), naive(mixer, x_BTC, mask_BT), rtol=1e-5, atol=1e-5)
    for row in range(3):
        kept = mask_BT[row].bool()
        alone = mixer(x_BTC[row : row + 1, kept])[0]
        torch.testing.assert_close(padded[row, kept], alone[0], rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_alone_is_zero_and_no_nan() -> None:
    mixer, x_BTC = make_mixer(), torch.randn(2, 5, 24)
    y_BTC = mixer(x_BTC, padding_mask=torch.tensor([[1] * 5, [0] * 5]))[0]
    assert y_BTC[1].eq(0).all()
    assert y_BTC[0].ne(0).all()


def test_what_training_keeps_grows_linearly() -> None:
    def kept(length: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            make_mixer()(torch.randn(1, length, 24))
        return sum(sizes)

    constant = 2 * kept(200) - kept(400)
    assert kept(3200) == 16 * (kept(200) - constant) + constant


def converted(folder: Path, linear: Sequence[int] = (0, 2), architecture: str = "BertModel") -> Any:
    source = load_model(make_pico("bert", folder, architecture=architecture))
    return to_hybrid(source, [LINEAR if layer in linear else None for layer in range(4)])


def ids_and_mask() -> dict[str, Tensor]:
    ids_BT = torch.arange(3 * 9).reshape(3, 9) + 30
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = mask_BT[2, :4] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@pytest.mark.parametrize("architecture", HEADS)
@torch.no_grad()
def test_save_and_reload_with_every_head(tmp_path: Path, architecture: str) -> None:
    model, output = converted(tmp_path / "source", architecture=architecture), HEADS[architecture]
    for layer in (0, 2):
        maps = Parts(model).layers[layer].attention.self
        maps.feature_map_q.weight.normal_(0, 0.3)
    save_model(model, tmp_path / "source", tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert type(again) is type(model)
    torch.testing.assert_close(again(**ids_and_mask())[output], model(**ids_and_mask())[output], rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mixers"] == [LINEAR.to_json(), None] * 2


@pytest.mark.parametrize("architecture", HEADS)
@torch.no_grad()
def test_every_weight_is_carried_over(tmp_path: Path, architecture: str) -> None:
    model = converted(tmp_path, linear=(), architecture=architecture)
    source, output = load_model(tmp_path), HEADS[architecture]
    torch.testing.assert_close(model(**ids_and_mask())[output], source(**ids_and_mask())[output], rtol=0, atol=0)
    linear = to_hybrid(source, [LINEAR] * 4)
    state = linear.state_dict()
    new = {name for name in state if "feature_map" in name}
    assert len(new) == 8
    eye_DD = torch.eye(16)
    assert all((state[name] == eye_DD).all() for name in new)
    assert set(state) - new == set(source.state_dict())
    assert all((state[name] == value).all() for name, value in source.state_dict().items())


@torch.no_grad()
def test_each_implementation_of_softmax_masks_alike(tmp_path: Path) -> None:
    model, kept = converted(tmp_path), ids_and_mask()["attention_mask"].bool()
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model(**ids_and_mask()).last_hidden_state[kept])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(converted(tmp_path / "source"), tmp_path / "source", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    state = load_file(weights)
    del state["encoder.layer.0.attention.self.feature_map_q.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CompressError, match="feature_map_q"):
        load_model(tmp_path / "out")


def test_what_it_cannot_be_is_refused() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}
    with pytest.raises(ValueError, match="gated-linear"):
        HybridBertModel(HybridBertConfig(**sizes, mixers=[SPECS["gated-linear"].to_json()]))
    with pytest.raises(ValueError, match="2 entries for 1 layers"):
        HybridBertConfig(**sizes, mixers=[None, None])
    with pytest.raises(ValueError, match="decoder"):
        HybridBertConfig(**sizes, mixers=[None], is_decoder=True)
    model = HybridBertModel(HybridBertConfig(**sizes, mixers=[LINEAR.to_json()]))
    with pytest.raises(ValueError, match="4 dimensions"):
        model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 1, 3, 3))
