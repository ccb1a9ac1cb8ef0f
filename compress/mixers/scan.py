"""The four linear recurrences, in three forms that agree: `naive`, `chunked` (training, prefill) and `step` (decode).

A key/value head's state S (K × V, float32) is read by R = H/G query heads: query head h reads key/value head h // R.

    linear       S ← S + k vᵀ
    gated        S ← e^g S + k vᵀ                        (Mamba-2's SSD, arXiv 2405.21060)
    delta        S ← S + k (β (v − Sᵀk))ᵀ                (DeltaNet, arXiv 2406.06484)
    gated_delta  S ← e^g S, then as delta                (Gated DeltaNet, arXiv 2412.06464)
    o = Sᵀ q, after the update and without a scale       (as ONNX's LinearAttention with scale=1)

Shapes: B sequences, T tokens, H query heads, G key/value heads, K key size, V value size, N chunks of C tokens.
Inputs of any float type; outputs and states are float32, under autocast too. `segment_start_BT` is true where a new
document starts in a packed row: the state is emptied before that token. A token with k, g and β (linear rules: k and g)
zero leaves the state as it is: that is how callers mask padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .spec import UpdateRule


def step(
    q_B1HK: Tensor,
    k_B1GK: Tensor,
    v_B1GV: Tensor,
    log_decay_B1G: Tensor | None = None,
    beta_B1G: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    *,
    rule: UpdateRule,
    segment_start_B1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: its output (B, 1, H, V) and the state after it (B, G, K, V)."""
    log_decay_B1G, beta_B1G = _rates(rule, log_decay_B1G, beta_B1G, segment_start_B1, like=v_B1GV)
    with maybe_autocast(q_B1HK.device.type, enabled=False):
        k_BGK, v_BGV = k_B1GK[:, 0].float(), v_B1GV[:, 0].float()
        state = _start(state_BGKV, k_B1GK, v_B1GV)
        if log_decay_B1G is not None:
            state = state * log_decay_B1G[:, 0, :, None, None].exp()
        if beta_B1G is not None:
            recalled_BGV = (k_BGK.unsqueeze(-2) @ state).squeeze(-2)
            v_BGV = beta_B1G[:, 0, :, None] * (v_BGV - recalled_BGV)
        state = state + k_BGK.unsqueeze(-1) * v_BGV.unsqueeze(-2)
        q_BGRK = torch.unflatten(q_B1HK[:, 0].float(), 1, (k_BGK.shape[1], -1))
        return (q_BGRK @ state).flatten(1, 2).unsqueeze(1), state


def naive(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTG: Tensor | None = None,
    beta_BTG: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    *,
    rule: UpdateRule,
    segment_start_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference of the other forms. Outputs (B, T, H, V) and the last state."""
    outputs = []
    for t in range(q_BTHK.shape[1]):
        now = slice(t, t + 1)
        output, state_BGKV = step(
            q_BTHK[:, now],
            k_BTGK[:, now],
            v_BTGV[:, now],
            None if log_decay_BTG is None else log_decay_BTG[:, now],
            None if beta_BTG is None else beta_BTG[:, now],
            state_BGKV,
            rule=rule,
            segment_start_B1=None if segment_start_BT is None else segment_start_BT[:, now],
        )
        outputs.append(output)
    return torch.cat(outputs, 1), _start(state_BGKV, k_BTGK, v_BTGV)


def chunked(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTG: Tensor | None = None,
    beta_BTG: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    *,
    rule: UpdateRule,
    segment_start_BT: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same in time and memory linear in T: matrix products within chunks, one state carried from chunk to chunk.

    Outputs (B, T, H, V) and the last state. Every decay is exponentiated as a sum over its own interval, never as a
    quotient, so a strong decay neither overflows nor costs the weak ones their digits.
    """
    log_decay_BTG, beta_BTG = _rates(rule, log_decay_BTG, beta_BTG, segment_start_BT, like=v_BTGV)
    length, groups, size = q_BTHK.shape[1], k_BTGK.shape[2], min(chunk_size, q_BTHK.shape[1])
    with maybe_autocast(q_BTHK.device.type, enabled=False):
        q_BNGRCK = _chunks(torch.unflatten(q_BTHK, 2, (groups, -1)), size).movedim(3, 4)
        k_BNGCK, v_BNGCV = _chunks(k_BTGK, size), _chunks(v_BTGV, size)
        state = _start(state_BGKV, k_BTGK, v_BTGV)
        decays = None if log_decay_BTG is None else _Decays.of(_chunks(log_decay_BTG, size))
        if beta_BTG is None:
            states_BNGKV, state = _carry(k_BNGCK, v_BNGCV, decays, state)
        else:
            states_BNGKV, v_BNGCV, state = _carry_delta(k_BNGCK, v_BNGCV, _chunks(beta_BTG, size), decays, state)
        output = _read(q_BNGRCK, k_BNGCK, v_BNGCV, decays, states_BNGKV)
        return output.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length], state


class _Decays(NamedTuple):
    """The factors of one chunk: from token j to token i (0 above the diagonal), from before it to token i."""

    between_BNGCC: Tensor
    since_start_BNGC: Tensor

    @classmethod
    def of(cls, log_decay_BNGC: Tensor) -> _Decays:
        size = log_decay_BNGC.shape[-1]
        lower = torch.ones(size, size, dtype=torch.bool, device=log_decay_BNGC.device).tril()
        steps = log_decay_BNGC.unsqueeze(-1).expand(*log_decay_BNGC.shape, size)
        sums = steps.masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
        return cls(sums.masked_fill(~lower, -torch.inf).exp(), log_decay_BNGC.cumsum(-1).exp())

    @property
    def until_end_BNGC(self) -> Tensor:
        return self.between_BNGCC[..., -1, :]

    @property
    def whole_BNG11(self) -> Tensor:
        return self.since_start_BNGC[..., -1, None, None]


def _carry(k_BNGCK: Tensor, v_BNGCV: Tensor, decays: _Decays | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and the last one."""
    if decays is None:
        summed = torch.cat([state.unsqueeze(1), k_BNGCK.mT @ v_BNGCV], 1).cumsum(1)
        return summed[:, :-1], summed[:, -1]
    added_BNGKV = k_BNGCK.mT @ (v_BNGCV * decays.until_end_BNGC.unsqueeze(-1))
    states = [state]
    for whole, added in zip(decays.whole_BNG11.unbind(1), added_BNGKV.unbind(1), strict=True):
        states.append(states[-1] * whole + added)
    return torch.stack(states[:-1], 1), states[-1]


def _carry_delta(
    k_BNGCK: Tensor, v_BNGCV: Tensor, beta_BNGC: Tensor, decays: _Decays | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each chunk, what each token really adds (the WY form's Ṽ = U − W S), and the last state."""
    overlap_BNGCC = k_BNGCK @ k_BNGCK.mT
    reach_BNGCK, kept_BNGCK = k_BNGCK, k_BNGCK
    if decays is not None:
        overlap_BNGCC = overlap_BNGCC * decays.between_BNGCC
        reach_BNGCK = k_BNGCK * decays.since_start_BNGC.unsqueeze(-1)
        kept_BNGCK = k_BNGCK * decays.until_end_BNGC.unsqueeze(-1)
    beta_BNGC1 = beta_BNGC.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(
        (beta_BNGC1 * overlap_BNGCC).tril(-1),
        beta_BNGC1 * torch.cat([v_BNGCV, reach_BNGCK], -1),
        upper=False,
        unitriangular=True,
    )
    u_BNGCV, w_BNGCK = solved.split([v_BNGCV.shape[-1], k_BNGCK.shape[-1]], -1)
    states, values = [state], []
    for n in range(k_BNGCK.shape[1]):
        before = states[-1]
        values.append(u_BNGCV[:, n] - w_BNGCK[:, n] @ before)
        faded = before if decays is None else before * decays.whole_BNG11[:, n]
        states.append(faded + kept_BNGCK[:, n].mT @ values[-1])
    return torch.stack(states[:-1], 1), torch.stack(values, 1), states[-1]


def _read(q_BNGRCK: Tensor, k_BNGCK: Tensor, v_BNGCV: Tensor, decays: _Decays | None, states_BNGKV: Tensor) -> Tensor:
    """Outputs (B, N, G, R, C, V): each chunk's own tokens and the state before it."""
    heads, size = q_BNGRCK.shape[3:5]
    q = q_BNGRCK.flatten(3, 4)  # the query heads of one group are rows of one product: keys are not repeated
    scores = torch.unflatten(q @ k_BNGCK.mT, 3, (heads, size))
    scores = scores.tril() if decays is None else scores * decays.between_BNGCC.unsqueeze(3)
    carried = torch.unflatten(q @ states_BNGKV, 3, (heads, size))
    if decays is not None:
        carried = carried * decays.since_start_BNGC[:, :, :, None, :, None]
    return carried + torch.unflatten(scores.flatten(3, 4) @ v_BNGCV, 3, (heads, size))


def _chunks(x_BTG: Tensor, size: int) -> Tensor:
    """(B, T, G, …) → (B, N, G, C, …) in float32, the last chunk filled with zeros."""
    missing = -x_BTG.shape[1] % size
    padded = F.pad(x_BTG.float(), [0, 0] * (x_BTG.dim() - 2) + [0, missing]) if missing else x_BTG.float()
    return torch.unflatten(padded, 1, (-1, size)).transpose(2, 3)


def _start(state_BGKV: Tensor | None, k_BTGK: Tensor, v_BTGV: Tensor) -> Tensor:
    if state_BGKV is not None:
        return state_BGKV.float()
    batch, groups, values = v_BTGV.shape[0], *v_BTGV.shape[2:]
    return torch.zeros(batch, groups, k_BTGK.shape[-1], values, device=v_BTGV.device)


def _rates(
    rule: UpdateRule,
    log_decay_BTG: Tensor | None,
    beta_BTG: Tensor | None,
    segment_start_BT: Tensor | None,
    *,
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Log decay, −inf where a document starts and None where nothing is ever forgotten, and beta; in float32."""
    if (log_decay_BTG is not None) != rule.startswith("gated") or (beta_BTG is not None) != rule.endswith("delta"):
        raise ValueError(f"rule {rule!r} with log_decay={log_decay_BTG is not None}, beta={beta_BTG is not None}")
    if segment_start_BT is not None:
        log_decay_BTG = like.new_zeros(like.shape[:3]) if log_decay_BTG is None else log_decay_BTG
        log_decay_BTG = log_decay_BTG.float().masked_fill(segment_start_BT.unsqueeze(-1), -torch.inf)
    return None if log_decay_BTG is None else log_decay_BTG.float(), None if beta_BTG is None else beta_BTG.float()
