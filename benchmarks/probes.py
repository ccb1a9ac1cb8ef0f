"""Questions about what stands earlier in a context: MQAR and the needle, and what a model answers.

Shapes: N sequences, T tokens, P pairs, R tokens of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.benchmarks.haystack import Haystack
from compress.benchmarks.quality import Ints, token_nll
from compress.benchmarks.scorers import Scorer

_CITIES = ("Oslo", "Lima", "Cairo", "Madrid", "Vienna", "Dublin", "Prague", "Athens", "Lisbon", "Berlin", "Tokyo",
           "Delhi", "Boston", "Dallas", "Moscow", "Warsaw")  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What is read, ids (T,); after which rows (R,) an answer is due, and which, (R,).

    choices_C: the answers among which a guess is made, where there are such.
    """

    ids_T: Ints
    rows_R: Ints
    answers_R: Ints
    choices_C: Ints | None = None


@dataclass(frozen=True)
class Answers:
    """Of each answer, (R,): whether the likeliest token is right, whether that among the choices is, and log p."""

    right_R: NDArray[np.bool_]
    chosen_R: NDArray[np.bool_]
    logprob_R: NDArray[np.float64]


def ask(score: Scorer, probe: Probe) -> Answers:
    """What a model answers, each answer's earlier tokens given."""
    logits_RV = score(probe.ids_T, probe.rows_R)
    right_R = logits_RV.argmax(axis=1) == probe.answers_R
    chosen_R = right_R
    if probe.choices_C is not None:
        chosen_R = probe.choices_C[logits_RV[:, probe.choices_C].argmax(axis=1)] == probe.answers_R
    return Answers(right_R, chosen_R, -token_nll(logits_RV, probe.answers_R))


def mqar_batch(num_sequences: int, num_pairs: int, length: int, vocabulary: Ints, seed: int) -> tuple[Ints, Ints, Ints]:
    """Multi-query associative recall over bare token ids, to train and to test small models on.

    Returns ids (N, length), the rows (N, P) of the repeated keys, and the values (N, P) to be predicted there. Keys
    are drawn from the first half of `vocabulary`, values from the second, none twice in a sequence. The pairs stand at
    the start; after them each key is repeated once, in random order at random even distances, with its value behind
    it; what is left is noise from the vocabulary without this sequence's keys and values.
    Paper: Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models, 2023, with distances
    drawn evenly and not from a power law. Raises ValueError where the pairs or words do not fit.
    """
    half = len(vocabulary) // 2
    num_slots = length // 2 - num_pairs
    if num_pairs > min(num_slots, half - 1):
        raise ValueError(f"{num_pairs} pairs need 4 tokens each of {length}, and fewer than half of the vocabulary")
    rng = np.random.default_rng(seed)
    ids_NT = np.empty((num_sequences, length), np.int64)
    rows_NP = np.empty((num_sequences, num_pairs), np.int64)
    answers_NP = np.empty_like(rows_NP)
    for ids_T, rows_P, answers_P in zip(ids_NT, rows_NP, answers_NP, strict=True):
        keys, values = rng.permutation(vocabulary[:half]), rng.permutation(vocabulary[half : 2 * half])
        ids_T[:] = rng.choice(np.concatenate([keys[num_pairs:], values[num_pairs:]]), length)
        ids_T[: 2 * num_pairs] = np.stack([keys[:num_pairs], values[:num_pairs]], axis=1).ravel()
        rows_P[:] = 2 * (num_pairs + np.sort(rng.choice(num_slots, num_pairs, replace=False)))
        order = rng.permutation(num_pairs)
        answers_P[:] = values[order]
        ids_T[rows_P], ids_T[rows_P + 1] = keys[order], answers_P
    return ids_NT, rows_NP, answers_NP


def mqar_probe(haystack: Haystack, number: int, of: int, num_pairs: int, length: int) -> Probe:
    """MQAR in the form that a pretrained language model can do: lines ` key: value`, real text, the lines again.

    Every pair is stated at the start and asked for at the end, in another order, so what it takes is remembering
    `num_pairs` pairs over a context of `length` tokens. Guessing among the values is right once in `num_pairs`.
    """
    rng = np.random.default_rng(number)
    keys, values = rng.choice(haystack.words, (2, num_pairs), replace=False)
    between, end = haystack.piece(":"), haystack.piece("Ċ", "\n", "<0x0A>")
    lines_PL = np.array([[key, *between, value, *end] for key, value in zip(keys, values, strict=True)])
    order = rng.permutation(num_pairs)
    text = haystack.window(number, of, length - 2 * lines_PL.size - len(end))
    ids_T = np.concatenate([lines_PL.ravel(), text.ids_T, end, lines_PL[order].ravel()]).astype(np.int64)
    rows_P = length - lines_PL.size + len(between) + lines_PL.shape[1] * np.arange(num_pairs)
    return Probe(ids_T, rows_P, values[order], values)


def needle_probe(haystack: Haystack, number: int, of: int, depth: float, length: int) -> Probe:
    """A made-up fact between two sentences of real text, at the place nearest to `depth`, and a question at the end.

    The same `number` gives the same fact and text at every depth. The answer is the fact's number, of 4 digits.
    """
    city = _CITIES[number % len(_CITIES)]
    secret = np.random.default_rng(number).integers(1000, 10_000)
    question = f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
    stated = haystack.encode(f" The secret number of {city} is {secret}.")
    asked = haystack.encode(f"{question} {secret}")
    answers_R = np.array(asked[len(haystack.encode(question)) :], np.int64)
    text = haystack.window(number, of, length - len(stated) - len(asked))
    place = text.ends_E[np.abs(text.ends_E - depth * len(text.ids_T)).argmin()]
    ids_T = np.concatenate([text.ids_T[:place], stated, text.ids_T[place:], asked]).astype(np.int64)
    return Probe(ids_T, np.arange(length - len(answers_R), length) - 1, answers_R)
