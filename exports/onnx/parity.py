"""Does ONNX Runtime compute what torch computes? Logits and greedy tokens on real text at identical call shapes.

Shapes: T prompt tokens, N tokens generated after it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.runtime.session import OnnxModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_GREEDY = 64
MAX_PROMPT = 192
_TOPICS = ("assignment", "exceptions")
"""Pages of the interpreter's own documentation: real text that is always at hand."""
_SHARES = (1.0, 0.1)
"""How much of `MAX_PROMPT` each page fills: a long prompt and a short one."""


@dataclass(frozen=True)
class Reference:
    """What torch gives for one prompt, `(1, T)`: its logits `(T, V)`, and N greedy tokens with the logits after each."""

    prompt: NDArray[np.int64]
    whole_TV: NDArray[np.float32]
    tokens_N: NDArray[np.int64]
    stepwise_NV: NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """Largest differences of logits: whole prompts, single steps, and ONNX Runtime's own whole against its own steps.

    relative_rms: the steps' root mean square difference over the standard deviation of torch's logits. mismatches:
    greedy tokens that differ though torch's two best logits lie further apart than twice the tolerance.
    """

    whole_error: float
    step_error: float
    own_step_error: float
    relative_rms: float
    mismatches: int
    num_tokens: int
    top1_agreement: float

    @property
    def max_error(self) -> float:
        """The larger of the two errors against torch."""
        return max(self.whole_error, self.step_error)


def prompts(tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[NDArray[np.int64]]:
    """Fixed prompts `(1, T)` that leave room for the greedy tokens within `max_length`."""
    import pydoc_data.topics

    room = min(MAX_PROMPT, max_length - NUM_GREEDY)
    texts = [pydoc_data.topics.topics[name] for name in _TOPICS]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cut = [one[: max(2, int(room * share))] for one, share in zip(ids, _SHARES, strict=True)]
    return [np.asarray(one, np.int64)[None] for one in cut]


def torch_reference(model: PreTrainedModel, prompt: NDArray[np.int64]) -> Reference:
    """torch's logits and greedy tokens after `prompt` `(1, T)`, with its own cache."""
    import torch

    run: Any = model
    with torch.inference_mode():
        output = run(input_ids=torch.from_numpy(prompt), use_cache=True)
        whole, tokens, stepwise = output.logits[0].numpy(), [], [output.logits[0, -1].numpy()]
        while len(tokens) < NUM_GREEDY:
            tokens.append(int(stepwise[-1].argmax()))
            output = run(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            stepwise.append(output.logits[0, -1].numpy())
    return Reference(prompt, whole, np.array(tokens), np.stack(stepwise[:-1]))


def compare_decoder(onnx: OnnxModel, references: Sequence[Reference], tolerance: float) -> Parity:
    """ONNX Runtime against torch, each step fed with torch's token, so that one flip does not hide what follows."""
    whole_error = step_error = own_error = rms = 0.0
    mismatches = agreed = 0
    for reference in references:
        whole_TV, _ = onnx.forward(reference.prompt)
        whole_error = max(whole_error, _difference(whole_TV[0], reference.whole_TV))
        decoder = onnx.decoder(reference.prompt.shape[1] + len(reference.tokens_N))
        rows = [decoder.prefill(reference.prompt)[0]]
        rows += [decoder.step(token)[0] for token in reference.tokens_N[:-1]]
        steps_NV = np.stack(rows)
        step_error = max(step_error, _difference(steps_NV, reference.stepwise_NV))
        rms = max(rms, float(np.std(steps_NV - reference.stepwise_NV) / np.std(reference.stepwise_NV)))
        own_error = max(own_error, _own_difference(onnx, reference, steps_NV))
        differs = steps_NV.argmax(-1) != reference.tokens_N
        best_N2 = np.sort(reference.stepwise_NV, axis=-1)[:, -2:]
        mismatches += int((differs & (best_N2[:, 1] - best_N2[:, 0] > 2 * tolerance)).sum())
        agreed += int((~differs).sum())
    total = sum(len(reference.tokens_N) for reference in references)
    return Parity(whole_error, step_error, own_error, rms, mismatches, total, agreed / total)


def compare_encoder(onnx: OnnxModel, expected: Sequence[tuple[NDArray[np.int64], Mapping[str, Any]]]) -> float:
    """The largest difference of any output; `expected` are input ids `(1, T)` with torch's outputs by name."""
    errors = [0.0]
    for input_ids, outputs in expected:
        actual = onnx.encode(input_ids)
        errors += [_difference(actual[name], value) for name, value in outputs.items()]
    return max(errors)


def _own_difference(onnx: OnnxModel, reference: Reference, steps_NV: NDArray[Any]) -> float:
    """Prompt and generated tokens in one call, against the steps."""
    tokens = np.concatenate([reference.prompt[0], reference.tokens_N[:-1]])[None]
    whole_TV = onnx.forward(tokens)[0][0]
    return _difference(whole_TV[-len(steps_NV) :], steps_NV)


def _difference(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(actual.astype(np.float32) - expected).max())
