"""A mixer is the attention's replacement: same parameters, same inputs, the same output however the tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from compress.mixers.mixer import Mixer
from compress.mixers.spec import SPECS, WINDOWED, MixerSpec, MixerType

SIZES = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16,
    "vocab_size": 32, "num_hidden_layers": 1,
}  # fmt: skip
LENGTH = 80
CASES = {**SPECS, **{f"{name}, window": replace(SPECS[name], window=8) for name in sorted(WINDOWED)}}
CASES["softmax map, window"] = replace(SPECS["gated-linear"], feature_map="softmax", window=8)
each_type = pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())


def config_of(spec: MixerSpec, model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    config = AutoConfig.for_model(model_type, **SIZES | overrides)
    config.layer_types = ["linear_attention"]
    config.mixers = [spec.to_json()]
    return config


def mixer_of(spec: MixerSpec, **overrides: Any) -> Mixer:
    """A mixer with random weights everywhere, in eval mode."""
    mixer = Mixer(config_of(spec, **overrides), 0).eval()
    source = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=source)
    return mixer


def hidden(length: int = LENGTH, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(seed))


def rotation(positions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    config = LlamaConfig(**SIZES)  # type: ignore[arg-type]
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), torch.as_tensor(positions).view(1, -1))
    return cos, sin


def run(mixer: Mixer, x: Tensor, cut: slice = slice(None), **inputs: Any) -> Tensor:
    """The output for the tokens of `x` in `cut`, at their positions in `x`."""
    with torch.no_grad():
        cos, sin = (part.to(x.dtype) for part in rotation(range(x.shape[1])[cut]))
        output: Tensor = mixer(x[:, cut], (cos, sin), **inputs)[0]
    return output


def assert_near(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    assert (ours - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("llama", {"attention_bias": True}), ("mistral", {}), ("qwen2", {"head_dim": 8}),
     ("qwen3", {"head_dim": 16}), ("qwen3", {"attention_bias": True})],
)  # fmt: skip
@each_type
def test_it_takes_the_attentions_parameters(spec: MixerSpec, model_type: str, overrides: dict[str, Any]) -> None:
    plain = AutoConfig.for_model(model_type, **SIZES | overrides)
    attention = AutoModelForCausalLM.from_config(plain).model.layers[0].self_attn
    mixer = Mixer(config_of(spec, model_type, **overrides), 0)
    assert list(mixer.load_state_dict(attention.state_dict(), strict=False).unexpected_keys) == []
    new = {name.split(".")[0] for name in mixer.state_dict().keys() - attention.state_dict().keys()}
    assert new <= {"feature_map_q", "feature_map_k", "conv", "a_proj", "dt_proj", "A", "g_proj", "b_proj", "norm",
                   "w_proj"}  # fmt: skip


def test_linear_is_softmax_attention_with_another_kernel() -> None:
    mixer, x = mixer_of(SPECS["linear"]), hidden()

    def heads(projection: nn.Linear) -> Tensor:
        return projection(x).unflatten(2, (-1, 8)).transpose(1, 2)

    def features(weight_HDD: Tensor, x_BHTD: Tensor) -> Tensor:
        z = x_BHTD @ weight_HDD.mT
        return torch.cat([z, -z], -1).softmax(-1)

    with torch.no_grad():
        q, k = apply_rotary_pos_emb(heads(mixer.q_proj), heads(mixer.k_proj), *rotation(range(LENGTH)))
        phi_q = features(mixer.feature_map_q.weight, q)
        phi_k = features(mixer.feature_map_k.weight, k).repeat_interleave(3, 1)
        scores = (phi_q @ phi_k.mT).tril()
        y = scores @ heads(mixer.v_proj).repeat_interleave(3, 1) / (scores.sum(-1, keepdim=True) + 1e-6)
        expected = mixer.o_proj(y.transpose(1, 2).flatten(2))
    assert_near(run(mixer, x), expected)


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_a_window_over_all_that_is_there_is_softmax_attention(name: MixerType) -> None:
    config = config_of(replace(SPECS[name], window=LENGTH))
    config._attn_implementation = "sdpa"
    mixer, attention, x = Mixer(config, 0).eval(), LlamaAttention(config, 0).eval(), hidden()
    attention.load_state_dict(mixer.state_dict(), strict=False)
    with torch.no_grad():
        softmax = attention(x, rotation(range(LENGTH)), None)[0]
    assert_near(run(mixer, x), softmax)


def test_linear_attention_reads_what_the_window_does_not() -> None:
    window, x = 8, hidden()
    mixer = mixer_of(replace(SPECS["linear"], window=window))

    def heads(projection: nn.Linear) -> Tensor:
        return projection(x).unflatten(2, (-1, 8)).transpose(1, 2)

    with torch.no_grad():
        q, k = apply_rotary_pos_emb(heads(mixer.q_proj), heads(mixer.k_proj), *rotation(range(LENGTH)))
        phi_q = mixer.feature_map_q(q.transpose(1, 2)).transpose(1, 2)
        phi_k = mixer.feature_map_k(k.transpose(1, 2)).transpose(1, 2).repeat_interleave(3, 1)
        k, v = (part.repeat_interleave(3, 1) for part in (k, heads(mixer.v_proj)))
        distance_TT = torch.arange(LENGTH).unsqueeze(1) - torch.arange(LENGTH)
        near = ((q @ k.mT) / 8**0.5).masked_fill((distance_TT < 0) | (distance_TT >= window), -torch.inf).softmax(-1)
        far = (phi_q @ phi_k.mT).masked_fill(distance_TT < window, 0)
        weight_BHT1 = mixer.w_proj(x).exp().mT.unsqueeze(-1)
        y = (weight_BHT1 * near + far) @ v / (weight_BHT1 + far.sum(-1, keepdim=True))
        expected = mixer.o_proj(y.transpose(1, 2).flatten(2))
    assert_near(run(mixer, x), expected)


@each_type
def test_prefill_and_steps_are_the_whole(spec: MixerSpec) -> None:
    mixer, x = mixer_of(spec), hidden()
    cache = DynamicCache(config=config_of(spec))
    bounds = [0, 2, 70, 71, 72, LENGTH]  # the first piece is shorter than the convolution
    pieces = [run(mixer, x, slice(a, b), cache=cache) for a, b in pairwise(bounds)]
    assert_near(torch.cat(pieces, 1), run(mixer, x))
    state = cache.layers[0].recurrent_states[0]
    assert state.dtype == torch.float32
    assert state.shape == (2, 2, spec.key_dim(8), spec.value_dim(8))
    cache.reset()
    assert_near(run(mixer, x, cache=cache), run(mixer, x))


@each_type
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone_and_can_be_continued(spec: MixerSpec, side: str) -> None:
    mixer, x = mixer_of(spec), hidden()
    short = 30
    offset = LENGTH - short if side == "left" else 0
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1] = 0
    mask[1, offset : offset + short] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rotations = [torch.cat(parts) for parts in zip(*(rotation(row) for row in positions), strict=True)]
    cache, next_x = DynamicCache(config=config_of(spec)), hidden(1, seed=2)
    with torch.no_grad():
        batch = mixer(x, rotations, padding_mask=mask, cache=cache)[0]
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        rotations = [torch.cat(parts) for parts in zip(rotation([LENGTH]), rotation([short]), strict=True)]
        rotations = [part.view(2, 1, -1) for part in rotations]
        following = mixer(next_x, rotations, padding_mask=longer, cache=cache)[0]
    assert_near(torch.cat([batch[:1], following[:1]], 1), run(mixer, torch.cat([x[:1], next_x[:1]], 1)))
    alone = run(mixer, torch.cat([x[1:, offset : offset + short], next_x[1:]], 1))
    assert_near(torch.cat([batch[1:, offset : offset + short], following[1:]], 1), alone)


@each_type
def test_packed_documents_do_not_see_each_other(spec: MixerSpec) -> None:
    mixer, x = mixer_of(spec), hidden()
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[:, [0, 33]] = True
    with torch.no_grad():
        packed = mixer(x, rotation([*range(33), *range(LENGTH - 33)]), segment_start_BT=starts)[0]
    assert_near(packed, torch.cat([run(mixer, x[:, :33]), run(mixer, x[:, 33:])], 1))


@each_type
def test_the_past_does_not_see_the_future(spec: MixerSpec) -> None:
    mixer, x = mixer_of(spec), hidden()
    changed = torch.cat([x[:, :40], hidden(seed=9)[:, 40:]], 1)
    torch.testing.assert_close(run(mixer, x)[:, :40], run(mixer, changed)[:, :40], rtol=0, atol=1e-6)


def test_mamba2_starts_as_the_linear_mixer() -> None:
    linear = mixer_of(SPECS["linear"])
    mamba = Mixer(config_of(SPECS["mamba2"]), 0)
    mamba.load_state_dict(linear.state_dict(), strict=False)
    assert_near(run(mamba, hidden()), run(linear, hidden()))


@each_type
def test_every_parameter_can_learn(spec: MixerSpec) -> None:
    mixer = Mixer(config_of(spec), 0)
    mixer(hidden(), rotation(range(LENGTH)))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@each_type
def test_what_is_new_starts_alike_and_leaves_loaded_weights(spec: MixerSpec) -> None:
    theirs = tuple(f"{leaf}_proj." for leaf in "qkvo")
    new = [name for name, _ in Mixer(config_of(spec), 0).named_parameters() if not name.startswith(theirs)]
    mixer, other = Mixer(config_of(spec), 0), Mixer(config_of(spec), 0)
    changed = [parameter for name, parameter in mixer.named_parameters() if name in new]
    assert all(torch.equal(mine, other.get_parameter(name)) for mine, name in zip(changed, new, strict=True))
    with torch.no_grad():
        for parameter in changed:
            parameter.fill_(7.0)
    changed[0]._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what it has loaded
    mixer.reset_parameters()
    assert (changed[0] == 7).all()
    assert all(torch.equal(mixer.get_parameter(name), other.get_parameter(name)) for name in new[1:])


def test_decays_start_with_horizons_from_16_to_512_tokens() -> None:
    mixer = Mixer(config_of(SPECS["gated-linear"], num_key_value_heads=6), 0)
    rates = nn.functional.softplus(mixer.a_proj(torch.zeros(48)))
    torch.testing.assert_close(1 / rates, 512 * (1 / 32) ** (torch.arange(6) / 5), rtol=1e-4, atol=0)


@each_type
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_projects_in_half_and_scans_in_float32(spec: MixerSpec, autocast: bool) -> None:
    mixer, x = mixer_of(spec), hidden()
    expected = run(mixer, x)
    cache = DynamicCache(config=config_of(spec))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = run(mixer, x, cache=cache)
    else:
        found = run(mixer.bfloat16(), x.bfloat16(), cache=cache)
    assert found.dtype == torch.bfloat16
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert_near(found.float(), expected, 0.05)
