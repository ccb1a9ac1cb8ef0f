"""Does ONNX Runtime compute what torch computes? Outputs and greedy tokens on real text at identical call shapes.

Shapes: T prompt tokens, N tokens generated after it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.artifact import write_json
from compress.errors import StageFailed
from compress.exports.onnx import FEW
from compress.exports.onnx.exact import EXACT_FILE, write_exact
from compress.exports.onnx.tasks import dummy_inputs
from compress.models.pooling import Pooling
from compress.runtime.session import OnnxModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.exports.onnx.weights import Model
    from compress.quant.qtensor import QTensor

NUM_GREEDY = 32
"""Tokens generated after each prompt: 64 together."""
MAX_PROMPT = 192
ROUNDING_LIMIT = 0.5
"""How far rounded activations may move the outputs: root mean square over torch's standard deviation."""
_PAGES = {"assignment": 1.0, "exceptions": 0.1}
"""Pages of the interpreter's own documentation, real text that is always at hand, and their share of `MAX_PROMPT`."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Expected:
    """What torch gives for one prompt `(1, T)`: its outputs by name, `logits` `(1, T, V)` among a decoder's.

    A decoder also has N greedy tokens and the logits `(N, V)` that each was chosen from.
    """

    prompt: NDArray[np.int64]
    outputs: Arrays
    tokens_N: NDArray[np.int64] | None = None
    stepwise_NV: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Expectations:
    """torch's side of the comparison, and optimum's dummy inputs, which the graph must take."""

    prompts: tuple[Expected, ...]
    dummy: Arrays


@dataclass(frozen=True)
class Parity:
    """Largest differences of outputs: whole prompts, single steps, and ONNX Runtime's own whole against its own steps.

    relative_rms: root mean square difference over the standard deviation of torch's outputs. mismatches: greedy tokens
    that differ though torch's two best logits lie further apart than twice the tolerance.
    """

    whole_error: float = 0.0
    step_error: float = 0.0
    own_step_error: float = 0.0
    relative_rms: float = 0.0
    mismatches: int = 0
    num_tokens: int = 0

    @property
    def max_error(self) -> float:
        """The larger of the two errors against torch."""
        return max(self.whole_error, self.step_error)

    def worst(self, other: Parity) -> Parity:
        """Both comparisons as one."""
        return Parity(
            max(self.whole_error, other.whole_error), max(self.step_error, other.step_error),
            max(self.own_step_error, other.own_step_error), max(self.relative_rms, other.relative_rms),
            self.mismatches + other.mismatches, self.num_tokens + other.num_tokens,
        )  # fmt: skip


def expectations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, pooling: Pooling | None,
    described: Model, chunk_size: int | None,
) -> Expectations:  # fmt: skip
    """Run torch over the fixed prompts; in one call, where other weights read prompts than those that write."""
    import pydoc_data.topics

    is_decoder = task.endswith("-with-past")
    one_call = chunk_size if described.prompt and chunk_size else MAX_PROMPT  # the last few would be read otherwise
    positions = model.config.max_position_embeddings
    num_greedy = min(NUM_GREEDY, positions // 2)
    room = min(MAX_PROMPT, positions - num_greedy, one_call)
    expected = []
    for page, share in _PAGES.items():
        options = {"add_special_tokens": False, "truncation": True, "max_length": max(2, int(room * share))}
        prompt = np.asarray(tokenizer(pydoc_data.topics.topics[page], **options)["input_ids"], np.int64)[None]
        weights = described.prompt if prompt.shape[1] > FEW else {}
        if is_decoder:
            expected.append(_expect_decoder(model, prompt, weights, num_greedy))
        else:
            expected.append(_expect_encoder(model, prompt, pooling))
    return Expectations(tuple(expected), dummy_inputs(model, task))


def verify(folder: Path, expected: Expectations, tolerance: float, threads: int) -> tuple[Parity, Parity]:
    """Compare the folder with torch and write `parity.json`: (without rounded activations, as shipped).

    Where activations are rounded, the tolerance is for the same graph without rounding; the graph that is shipped may
    differ by `ROUNDING_LIMIT`, and what it does is reported. Raises StageFailed beyond either.
    """
    rounds = write_exact(folder)
    exact = _compare(OnnxModel(folder, threads=threads, file=EXACT_FILE if rounds else ""), expected, tolerance)
    (folder / EXACT_FILE).unlink(missing_ok=True)
    shipped = _compare(OnnxModel(folder, threads=threads), expected, tolerance) if rounds else exact
    record = {"tolerance": tolerance, "exact": asdict(exact), "rounding_limit": ROUNDING_LIMIT}
    write_json(folder / "parity.json", {**record, "rounded": asdict(shipped) if rounds else None})
    if not exact.max_error <= tolerance:
        what = f"ONNX Runtime differs from torch by {exact.max_error:.2g}, beyond parity_tolerance {tolerance:g}"
        raise StageFailed("export-onnx", what, "see parity.json")
    if exact.mismatches:
        what = f"{exact.mismatches} of {exact.num_tokens} greedy tokens differ from torch's"
        raise StageFailed("export-onnx", what, "see parity.json")
    if not shipped.relative_rms <= ROUNDING_LIMIT:
        what = f"rounded activations or a rounded cache move the outputs by {shipped.relative_rms:.2g} of their spread"
        fix = f"the limit is {ROUNDING_LIMIT:g}; except the layers with outliers, or use a block-wise scheme"
        raise StageFailed("export-onnx", what, fix)
    return exact, shipped


def _expect_decoder(
    model: PreTrainedModel, prompt: NDArray[np.int64], weights: Mapping[str, QTensor], num_greedy: int
) -> Expected:
    """torch's logits and greedy tokens, with its own cache. weights: those that read the prompt, where others write."""
    import torch

    from compress.exports.onnx.prompt import reading
    from compress.mixers.cache_name import CACHE

    run: Any = model
    with torch.inference_mode():
        with reading(model, weights):
            output = run(input_ids=torch.from_numpy(prompt), use_cache=True)
        outputs = {"logits": output.logits.numpy()}
        tokens: list[int] = []
        stepwise = [output.logits[0, -1].numpy()]
        while len(tokens) < num_greedy:
            tokens.append(int(stepwise[-1].argmax()))
            past = {CACHE: getattr(output, CACHE)}
            output = run(input_ids=torch.tensor([tokens[-1:]]), use_cache=True, **past)
            stepwise.append(output.logits[0, -1].numpy())
    return Expected(prompt, outputs, np.array(tokens), np.stack(stepwise[:-1]))


def _expect_encoder(model: PreTrainedModel, prompt: NDArray[np.int64], pooling: Pooling | None) -> Expected:
    import torch

    run: Any = model
    with torch.inference_mode():
        outputs = {name: value.numpy() for name, value in run(input_ids=torch.from_numpy(prompt)).items()}
    if pooling:
        outputs["sentence_embedding"] = pooling.of(outputs["last_hidden_state"])
    return Expected(prompt, outputs)


def _compare(onnx: OnnxModel, expected: Expectations, tolerance: float) -> Parity:
    dummy = {**{slot.past: slot.empty(1) for slot in onnx.cache}, **expected.dummy}
    dummy |= {slot.past: dummy[slot.past].astype(slot.dtype) for slot in onnx.cache}
    onnx.run({name: dummy[name] for name in onnx.inputs})
    parity = Parity()
    for one in expected.prompts:
        compared = _compare_decoder(onnx, one, tolerance) if onnx.is_decoder else _compare_encoder(onnx, one)
        parity = parity.worst(compared)
    return parity


def _compare_encoder(onnx: OnnxModel, expected: Expected) -> Parity:
    actual = onnx.encode(expected.prompt)
    pairs = [(actual[name], expected.outputs[name]) for name in onnx.outputs]
    return Parity(
        whole_error=max(_difference(*pair) for pair in pairs), relative_rms=max(_relative_rms(*pair) for pair in pairs)
    )


def _compare_decoder(onnx: OnnxModel, expected: Expected, tolerance: float) -> Parity:
    """Each step is fed with torch's token, so that one flip does not hide what follows."""
    assert expected.tokens_N is not None
    assert expected.stepwise_NV is not None
    tokens_N, logits_NV = expected.tokens_N, expected.stepwise_NV
    whole, _ = onnx.forward(expected.prompt)
    decoder = onnx.decoder(expected.prompt.shape[1] + len(tokens_N))
    rows = [decoder.prefill(expected.prompt)[0], *(decoder.step(token)[0] for token in tokens_N[:-1])]
    steps_NV = np.stack(rows)
    text = np.concatenate([expected.prompt[0], tokens_N[:-1]])[None]
    own_NV = onnx.forward(text)[0][0, -len(steps_NV) :]
    best_N2 = np.sort(logits_NV, axis=-1)[:, -2:]
    differs = (steps_NV.argmax(-1) != tokens_N) & (best_N2[:, 1] - best_N2[:, 0] > 2 * tolerance)
    return Parity(
        _difference(whole, expected.outputs["logits"]), _difference(steps_NV, logits_NV), _difference(own_NV, steps_NV),
        _relative_rms(steps_NV, logits_NV), int(differs.sum()), len(tokens_N),
    )  # fmt: skip


def _difference(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference; infinite where a number is none, so that no maximum loses it."""
    return float(np.nan_to_num(np.abs(actual - expected), nan=np.inf).max())


def _relative_rms(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Over the outputs' spread; over their size where there is one output alone, as a regression's."""
    if not np.isfinite(actual).all():
        return float("inf")
    spread = np.std(expected) if expected.size > 1 else np.abs(expected).max()
    return float(np.sqrt(np.mean(np.square(actual - expected))) / spread)
