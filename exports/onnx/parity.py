"""Does ONNX Runtime compute what torch computes? Outputs and greedy tokens on real text at identical call shapes.

Shapes: T prompt tokens, N tokens generated after it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
"""How far any rounded activations may move the outputs: root mean square over torch's standard deviation."""
_LIMITS = {"blocks": 0.15, "few levels": 0.3, "cache": 0.15, "tensor": ROUNDING_LIMIT}
"""The same by what is rounded, some three to five times what it costs where nothing is wrong.

blocks: a step is a 127th of a block's largest, 0.5 % of what it rounds: 0.02 to 0.04 behind 4, 6 and 30 layers. few
levels: the same activations, but weights of 2 bits magnify what they are given: 0.01 to 0.12. cache: a step is a 127th
of 1.5 times a channel's largest, and it is keys and values alone: 0.03 behind 4 layers. tensor: one range for all, so
that outliers set the step, from call to call: 0.01 to 0.16, and 0.65 where layers with outliers must be excepted.
Measured: benchmarks/results/quantisation-parity_smollm2-135m.md.
"""
_FEW_OUTPUTS = 64
"""A classifier's, which may be almost the same: a spread of nothing says nothing of how exact they are."""
_OF_TOKENS = 3
"""Axes of an output that has a row for each token."""
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
class Batch:
    """Texts of unequal length, special tokens in place, padded to `(B, T)`; and each row by itself, as torch has it.

    feeds: `input_ids` and `attention_mask`.
    """

    feeds: Mapping[str, NDArray[np.int64]]
    rows: tuple[Expected, ...]


@dataclass(frozen=True)
class Expectations:
    """torch's side of the comparison, and optimum's dummy inputs, which the graph must take.

    batch: an encoder's. rounding_limit: how far what the graph rounds may move its outputs.
    """

    prompts: tuple[Expected, ...]
    dummy: Arrays
    batch: Batch | None = None
    rounding_limit: float = ROUNDING_LIMIT

    def spreads(self) -> dict[str, float]:
        """Of each output, over all texts: a classifier's few numbers of one text may lie close together by chance."""
        texts = [*self.prompts, *(self.batch.rows if self.batch else ())]
        return {
            name: _spread(np.concatenate([text.outputs[name].ravel() for text in texts]))
            for name in self.prompts[0].outputs
        }


@dataclass(frozen=True)
class Parity:
    """Largest differences of outputs: whole prompts, single steps, and ONNX Runtime's own whole against its own steps.

    relative_error: the largest against torch over the standard deviation of torch's outputs at the same positions.
    relative_rms: the root mean square difference over it. mismatches: greedy tokens that differ though torch's two best
    logits lie further apart than twice the tolerance. agreeing: of `num_tokens`, those that are torch's.
    """

    whole_error: float = 0.0
    step_error: float = 0.0
    own_step_error: float = 0.0
    relative_error: float = 0.0
    relative_rms: float = 0.0
    mismatches: int = 0
    agreeing: int = 0
    num_tokens: int = 0

    @property
    def greedy_agreement(self) -> float:
        """The share of greedy tokens that are torch's, of a decoder."""
        return self.agreeing / self.num_tokens

    @property
    def max_error(self) -> float:
        """The larger of the two errors against torch."""
        return max(self.whole_error, self.step_error)

    def worst(self, other: Parity) -> Parity:
        """Both comparisons as one."""
        return Parity(
            max(self.whole_error, other.whole_error), max(self.step_error, other.step_error),
            max(self.own_step_error, other.own_step_error), max(self.relative_error, other.relative_error),
            max(self.relative_rms, other.relative_rms), self.mismatches + other.mismatches,
            self.agreeing + other.agreeing, self.num_tokens + other.num_tokens,
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
    texts = [pydoc_data.topics.topics[page] for page in _PAGES]
    batch = None if is_decoder else _expect_batch(model, tokenizer, texts, room, pooling)
    return Expectations(tuple(expected), dummy_inputs(model, task), batch, rounding_limit(described))


def rounding_limit(described: Model) -> float:
    """How far what the graph rounds may move its outputs: the widest limit of what rounds there."""
    from compress.quant.qtensor import QTensor

    tensors = [*described.tensors.values(), *described.prompt.values()]
    kinds = {
        "tensor" if not scheme.blockwise else "few levels" if scheme.bits == 2 else "blocks"
        for scheme in {tensor.scheme for tensor in tensors if isinstance(tensor, QTensor)}
    }
    kinds |= {"cache"} if described.cache_scales else set()
    return max((_LIMITS[kind] for kind in kinds), default=ROUNDING_LIMIT)


def verify(folder: Path, expected: Expectations, tolerance: float, threads: int) -> tuple[Parity, Parity]:
    """Compare the folder with torch and write `parity.json`: (without rounded activations, as shipped).

    tolerance: the largest difference over the standard deviation of torch's outputs at the same positions, since the
    last bit of a float is as large as the float. Where activations are rounded, that is for the same graph without
    rounding; the graph that is shipped may differ by `expected.rounding_limit`, and what it does is reported. Raises
    StageFailed beyond either.
    """
    limit = expected.rounding_limit
    rounds = write_exact(folder)
    exact = _compare(OnnxModel(folder, threads=threads, file=EXACT_FILE if rounds else ""), expected, tolerance)
    (folder / EXACT_FILE).unlink(missing_ok=True)
    shipped = _compare(OnnxModel(folder, threads=threads), expected, tolerance) if rounds else exact
    record = {"tolerance": tolerance, "exact": asdict(exact), "rounding_limit": limit}
    write_json(folder / "parity.json", {**record, "rounded": asdict(shipped) if rounds else None})
    if not exact.relative_error <= tolerance:
        size = f"{exact.max_error:.2g}, {exact.relative_error:.2g} of the outputs' spread"
        what = f"ONNX Runtime differs from torch by {size}, beyond parity_tolerance {tolerance:g}"
        raise StageFailed("export-onnx", what, "see parity.json")
    if exact.mismatches:
        what = f"{exact.mismatches} of {exact.num_tokens} greedy tokens differ from torch's"
        raise StageFailed("export-onnx", what, "see parity.json")
    if not shipped.relative_rms <= limit:
        what = f"rounded activations or a rounded cache move the outputs by {shipped.relative_rms:.2g} of their spread"
        fix = f"the limit is {limit:g}; except the layers with outliers, or use a block-wise scheme"
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


def _expect_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], room: int, pooling: Pooling | None
) -> Batch:
    """Rows as long as each text's share of `room`, padded on the right, where torch's positions stay a row's own."""
    rows = [
        tokenizer(text, truncation=True, max_length=max(4, int(room * share)))
        for text, share in zip(texts, _PAGES.values(), strict=True)
    ]
    ids = [np.array(row["input_ids"], np.int64) for row in rows]
    shape = len(rows), max(map(len, ids))
    feeds = {"input_ids": np.full(shape, tokenizer.pad_token_id or 0), "attention_mask": np.zeros(shape, np.int64)}
    for row, own in enumerate(ids):
        feeds["input_ids"][row, : len(own)], feeds["attention_mask"][row, : len(own)] = own, 1
    return Batch(feeds, tuple(_expect_encoder(model, own[None], pooling) for own in ids))


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
    if not onnx.is_decoder:
        return parity.worst(_compare_encoder(onnx, expected))
    for one in expected.prompts:
        parity = parity.worst(_compare_decoder(onnx, one, tolerance))
    return parity


def _compare_encoder(onnx: OnnxModel, expected: Expectations) -> Parity:
    parity, spreads = Parity(), expected.spreads()
    for actual, wanted in _encoded(onnx, expected):
        for name in onnx.outputs:
            pair = actual[name], wanted.outputs[name]
            error, rms = _difference(*pair), _rms(*pair)
            worst = Parity(error, relative_error=error / spreads[name], relative_rms=rms / spreads[name])
            parity = parity.worst(worst)
    return parity


def _encoded(onnx: OnnxModel, expected: Expectations) -> Iterator[tuple[Arrays, Expected]]:
    """Outputs beside torch's: of each prompt, and of each row's own tokens in the batch, whatever lies beside it."""
    for one in expected.prompts:
        yield onnx.encode(one.prompt), one
    if expected.batch:
        whole = onnx.encode(**expected.batch.feeds)
        for row, alone in enumerate(expected.batch.rows):
            own = expected.batch.feeds["attention_mask"][row] == 1
            yield {
                name: whole[name][row : row + 1][:, own if wanted.ndim == _OF_TOKENS else ...]
                for name, wanted in alone.outputs.items() if name in whole
            }, alone  # fmt: skip


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
    agrees = steps_NV.argmax(-1) == tokens_N
    differs = ~agrees & (best_N2[:, 1] - best_N2[:, 0] > 2 * tolerance * _spread(logits_NV))
    pairs = (whole, expected.outputs["logits"]), (steps_NV, logits_NV)
    whole_error, step_error = (_difference(*pair) for pair in pairs)
    return Parity(
        whole_error, step_error, _difference(own_NV, steps_NV),
        max(_difference(*pair) / _spread(pair[1]) for pair in pairs), _rms(steps_NV, logits_NV) / _spread(logits_NV),
        int(differs.sum()), int(agrees.sum()), len(tokens_N),
    )  # fmt: skip


def _difference(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference; infinite where a number is none, so that no maximum loses it."""
    return float(np.nan_to_num(np.abs(actual - expected), nan=np.inf).max())


def _rms(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.sqrt(np.mean(np.square(actual - expected))))


def _spread(expected: NDArray[Any]) -> float:
    """The standard deviation of outputs; of fewer than `_FEW_OUTPUTS` their root mean square; 1 where all are 0."""
    around = np.mean(expected) if expected.size >= _FEW_OUTPUTS else 0.0
    return float(np.sqrt(np.mean(np.square(expected - around)))) or 1.0
