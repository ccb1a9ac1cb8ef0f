"""What `recall:` asks for: which tasks, at which lengths. Imports neither torch nor numpy, so that `check` may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import replaced

_LINE_TOKENS = 4
"""Of an MQAR pair: key, colon, value, end of line."""
_LEAST_TEXT = 16
"""Tokens of text between the pairs and the questions."""
_FIRST_EDGE = 64


SHORTEST = 128
"""Tokens of the shortest context that holds the tasks."""


class Recall(BaseModel):
    """How well what was read is remembered, over several context lengths.

    MQAR (multi-query associative recall: Arora et al., Zoology, 2023) states pairs of words, goes on with real text
    and asks for every pair at the end. The needle is one made-up fact at a given depth of real text. Perplexity by
    position reads the longest context and tells whether more context goes on helping.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contexts: tuple[Annotated[int, Field(ge=SHORTEST)], ...] = Field(
        (256, 1024), min_length=1, description="context lengths, in tokens"
    )
    mqar_pairs: int = Field(16, ge=2, description="pairs of words that are stated and asked for in one MQAR context")
    needle_depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.1, 0.5, 0.9), min_length=1, description="where in the text the fact stands: 0 its start, 1 its end"
    )
    samples: int = Field(8, ge=2, description="texts a task and length; standard errors are over them")

    @property
    def longest(self) -> int:
        """The longest context, in tokens."""
        return max(self.contexts)

    @property
    def edges(self) -> tuple[int, ...]:
        """Where the buckets of positions end that perplexity is averaged in: doubling, and every context's length."""
        doubling = [_FIRST_EDGE << power for power in range(self.longest.bit_length())]
        return tuple(sorted({*self.contexts, *(edge for edge in doubling if edge < self.longest)}))

    def figures(self) -> Sequence[str]:
        """The names of all figures, standard errors left out. @N is a context length, or the end of a bucket."""
        tasks = ("mqar", "mqar_choice", "mqar_logprob", "needle", "needle_logprob")
        depths = [needle_at(length, depth) for length in self.contexts for depth in self.needle_depths]
        over = [f"{task}@{length}" for length in self.contexts for task in tasks]
        return [*over, *depths, *(f"perplexity@{edge}" for edge in self.edges)]

    def forward_tokens(self) -> int:
        """Tokens that each model reads."""
        return self.samples * (sum(self.contexts) * (1 + len(self.needle_depths)) + self.longest)

    def fitted(self, model: ModelShape) -> Recall:
        """The same, where nobody gave contexts, with none beyond the model's positions, if it has enough for one."""
        positions = model.max_position_embeddings
        if "contexts" in self.model_fields_set or not SHORTEST <= positions < self.longest:
            return self
        return replaced(self, {"contexts": tuple(sorted({min(context, positions) for context in self.contexts}))})

    def problems(self, model: ModelShape) -> Iterator[Problem]:
        """What does not fit `model`; `where` is the place in the stage's options."""
        if model.family.kind != "decoder":
            what = f"{model.model_type} is an encoder: it predicts no next token that it could recall"
            yield Problem("recall", what, "leave recall out")
            return
        if self.longest > model.max_position_embeddings:
            what = f"{self.longest} tokens, but the model reads at most {model.max_position_embeddings}"
            yield Problem("recall.contexts", what, "shorten the longest")
        room = (min(self.contexts) - _LEAST_TEXT) // (2 * _LINE_TOKENS)
        if self.mqar_pairs > room:
            what = f"{self.mqar_pairs} pairs, stated and asked for, do not fit into {min(self.contexts)} tokens"
            yield Problem("recall.mqar_pairs", what, f"at most {room}, or leave the shortest context out")

    def twin(self) -> Self:
        """The same tasks, small."""
        return self.model_copy(update={"contexts": (128,), "mqar_pairs": 2, "samples": 2})


def needle_at(length: int, depth: float) -> str:
    """The figure's name for a fact at `depth` of a context of `length` tokens."""
    return f"needle@{length},depth={depth:g}"
