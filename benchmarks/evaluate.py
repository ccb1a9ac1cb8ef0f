"""`evaluate`: how good an artifact is, and how far from the source model, on the eval split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field

from compress.artifact import Format, Metrics, write_json
from compress.benchmarks.recall import Recall
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import replaced
from compress.stage import SOURCE, Given, Ref, Stage, StageContext, unjudged

FIGURES = (
    "perplexity", "perplexity_ratio", "bits_per_byte", "bits_per_byte_ratio", "kl", "top1_agreement", "cosine",
)  # fmt: skip


class Evaluate(Stage):
    """Perplexity and bits per byte of any artifact, and its KL, top-1 agreement and paired ratios against the source.

    Where the two have different vocabularies, each reads its own tokens of the same text, and only bits per byte are
    compared. With `recall: {}`, also what short texts hide: how well it remembers what it has read, beside the source.
    """

    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 4
    summary: ClassVar[str] = "perplexity, bits per byte, KL and top-1 agreement against the source, with their errors"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch", "quantized", "onnx"})
    returns: ClassVar[Format] = "measurement"
    splits: ClassVar[frozenset[Literal["train", "eval"]]] = frozenset({"eval"})
    reads_target: ClassVar[bool] = True

    tokens: int = Field(8192, ge=8, description="tokens of the eval split that are read")
    sequence_length: int = Field(256, ge=4, description="tokens in one block; each block is read on its own")
    against: str = Field(SOURCE, description="the model that it is compared with: source, or an earlier stage's id")

    recall: Recall | None = Field(None, description="what else is asked: MQAR, a needle, perplexity by position")

    def inputs(self) -> Mapping[str, Ref]:
        return {self.against: Ref(self.against)}

    def computes_with(self, given: Given) -> frozenset[str]:
        """What runs the two models; transformers tokenises for both."""
        runs = {"onnxruntime" if format == "onnx" else "torch" for format in given.formats.values()}
        return frozenset({"transformers"} | runs)

    def depends_on_cpu(self, given: Given) -> bool:
        return any(given.formats[role] == "onnx" for role in given.rounding)

    def fitted(self, model: ModelShape) -> Self:
        fitted = super().fitted(model)
        recall = self.recall and self.recall.fitted(model)
        return fitted if recall is self.recall else replaced(fitted, {"recall": recall})

    def check(self, model: ModelShape) -> Iterator[Problem]:
        yield from unjudged("", model)
        longest = model.max_position_embeddings
        if self.sequence_length > longest:
            yield Problem(
                "sequence_length", f"{self.sequence_length} tokens, but the model reads at most {longest}", "lower it"
            )
        if self.tokens < 2 * self.sequence_length:
            yield Problem(
                "tokens", f"{self.tokens} is under two blocks of {self.sequence_length}: no standard error",
                f"at least {2 * self.sequence_length}",
            )  # fmt: skip
        if self.recall is not None:
            yield from self.recall.problems(model)

    def produces(self) -> Sequence[str]:
        figures = (*FIGURES, *(self.recall.figures() if self.recall else ()))
        return [name for figure in figures for name in (figure, f"{figure}_se")]

    def forward_tokens(self, model: ModelShape) -> float:
        return self.tokens + (self.recall.forward_tokens() if self.recall else 0)

    def twin(self) -> Self:
        length = min(self.sequence_length, 32)
        recall = self.recall and self.recall.twin()
        return self.model_copy(update={"sequence_length": length, "tokens": 2 * length, "recall": recall})

    def run(self, context: StageContext) -> Metrics:
        from compress.benchmarks.judging import judge
        from compress.units import Units

        found = judge(
            context.input.path, context.inputs[self.against].path, context.data,
            sequence_length=self.sequence_length, max_tokens=self.tokens,
            threads=context.target.threads, reporter=context.reporter, recall=self.recall,
            units=Units("evaluate", context.work / "blocks", log=context.reporter.log),
        )  # fmt: skip
        result = {**found.result(), "eval_tokens": float(found.num_tokens)}
        metrics = {"result": result, self.against: found.reference()}
        written = {
            "against": self.against,
            "sequence_length": self.sequence_length,
            "text": context.data.digest("eval"),
            "metrics": metrics,
            "blocks": found.to_json(),
        }
        write_json(context.out / "evaluation.json", written)
        return metrics
