"""`choose-format`: the export that is fastest here, among those that are good enough."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.artifact import MANIFEST, Artifact, Format, Metrics
from compress.benchmarks.contest import Budget as TimeBudget
from compress.benchmarks.evaluate import Evaluate
from compress.benchmarks.latency import Latency, prompts_within, race
from compress.errors import Problem, RequirementMissed, StageFailed
from compress.models.anatomy import ModelShape
from compress.options import counted, replaced
from compress.pipeline.require import RESULT, Verdict
from compress.registry import stage_class
from compress.stage import INPUT, Given, Ref, Stage, StageContext
from compress.stages.choose.budget import Budget
from compress.stages.choose.options import FLOAT, ChooseOptions, Way, Weights
from compress.units import Units

if TYPE_CHECKING:
    from compress.benchmarks.evaluation import Evaluation

QUALITY = " quality"
"""What the role of a candidate's evaluation ends with; it begins with the candidate's name."""
_LEAST = 2
"""Blocks that have a standard error."""


class ChooseFormat(ChooseOptions, Stage):
    """Quantises and exports its input in every scheme, and hands on the export that answers fastest on this machine.

    Only those whose quality is within the budget can be chosen; all are measured, in one run and by turns, prefill and
    decode apart. Every other block of the text chooses, and the figures are of those between: the best of several on
    the text that chose it looks better than it is. Candidates are made and evaluated by hidden stages of the pipeline:
    a killed run goes on with the next one, and another budget or other prompts make none again.
    """

    name: ClassVar[str] = "choose-format"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "measure quantised formats on this machine and take the fastest that is good enough"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "onnx"
    plots: ClassVar[Mapping[str, str]] = {"formats.png": "size, time and quality of each format"}
    measures_hardware: ClassVar[bool] = True
    libraries: ClassVar[frozenset[str]] = frozenset({"onnxruntime"})
    example: ClassVar[Mapping[str, Any]] = {"schemes": [FLOAT, "w4-block32"], "prompts": [64]}

    def inputs(self) -> Mapping[str, Ref]:
        """Every candidate by its name, and what was measured of its quality."""
        judging = {"against": self.against, "tokens": self.tokens, "sequence_length": self.sequence_length}
        found = {}
        for name, way in self.ways().items():
            found[name] = Ref(INPUT, via=way)
            found[name + QUALITY] = Ref(INPUT, via=(*way, ("evaluate", judging)))
        return found

    def fitted(self, model: ModelShape) -> Self:
        generates = model.family.kind == "decoder"
        changes = prompts_within(self, model.max_position_embeddings, generates=generates)
        return replaced(super().fitted(model), changes)

    def settled(self, given: Given) -> Mapping[str, Any]:
        """What is chosen among and by; how candidates are made and judged is told by inputs."""
        is_decoder = given.shape.family.kind == "decoder"
        usual = Budget.usual({"perplexity": 1.0}) if is_decoder else "usual"
        prefer = {phase: float(weight) for phase, weight in self._weights.items() if weight}
        return counted(self, {
            **dict.fromkeys(("quantize", "export", "tokens", "sequence_length")), "schemes": tuple(self.ways()),
            "budget": self.budget or usual, "prefer": prefer if is_decoder else None,
        })  # fmt: skip

    def rounds_activations(self, given: Given) -> bool:
        """Whichever it takes, this machine is in its key already."""
        return True

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Prompts beyond the model, and what a model of its kind has no figures for."""
        yield from self._latency.check(model)
        if self.tokens < 2 * _LEAST * self.sequence_length:
            what = f"{self.tokens} is under {2 * _LEAST} blocks of {self.sequence_length}: half choose, half are told"
            yield Problem("tokens", what, f"at least {2 * _LEAST * self.sequence_length}")
        is_decoder = model.family.kind == "decoder"
        if is_decoder and self.budget and self.budget.cosine is not None:
            what = "is of an encoder's embeddings, and this is a decoder"
            yield Problem("budget.cosine", what, "give perplexity, kl or top1_agreement")
        if not is_decoder and "prefer" in self.model_fields_set:
            yield Problem("prefer", "an encoder has one phase: there is nothing to prefer", "remove it")

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """That of the largest candidate, which may be the one."""

        def after(way: Way) -> float:
            size = before
            for name, options in way:
                size = stage_class(name).model_validate(dict(options)).weight_bytes(model, size)
            return size

        return max(map(after, self.ways().values()))

    def forward_tokens(self, model: ModelShape) -> float:
        return float((1 + self.repeats) * sum(prompt + self.new_tokens for prompt in self.prompts))

    def produces(self) -> Sequence[str]:
        return [*Evaluate.model_validate({}).produces(), *self._latency.produces()]

    def twin(self) -> Self:
        """Short, and without a budget: a random model is as bad as any other."""
        small = {"prompts": (8,), "new_tokens": 2, "repeats": 3, "max_seconds": 1.0}
        return self.model_copy(update={**small, "budget": Budget.model_validate({}), "max_size_mb": None})

    def run(self, context: StageContext) -> Metrics:
        """Copy the chosen export, with `formats.json`, `formats.md` and `formats.png` about all of them.

        Raises RequirementMissed where none is within the budget, before anything is timed.
        """
        from compress.benchmarks import report
        from compress.stages.choose.choice import Candidate, choose, rounds_ms
        from compress.stages.choose.record import write_record

        inputs = context.inputs
        verdicts, reported = self._verdicts(context)
        found = race(
            {name: inputs[name].path for name in verdicts}, self._latency.workloads(),
            TimeBudget(self.repeats, self.max_seconds),
            threads=context.target.threads, reporter=context.reporter,
            units=Units("choose-format", context.work / "rounds", log=context.reporter.log),
        )  # fmt: skip
        times = report.metrics(found)
        candidates = []
        for name, own in verdicts.items():
            figures = {**reported[name], **times[name]}
            rounds = rounds_ms(found["subjects"][name])
            candidates.append(Candidate(name, inputs[name].size_mb, figures, own, rounds))
        choice = choose(candidates, self._weights)
        for warning in choice.warnings:
            context.reporter.log.warning("choose-format: %s", warning)
        best = inputs[choice.best.name].path
        shutil.copytree(best, context.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        context.reporter.log.info("choose-format: %s", write_record(choice, found, context.out))
        return {RESULT: choice.best.figures, **{each.name: each.figures for each in candidates}}

    @property
    def _latency(self) -> Latency:
        """The stage that measures the same."""
        own = {name: getattr(self, name) for name in ("prompts", "new_tokens", "repeats", "max_seconds")}
        return Latency.model_validate({**own, "baselines": ()})

    @property
    def _weights(self) -> Mapping[str, float]:
        """How often each phase of a decoder counts."""
        if isinstance(self.prefer, Weights):
            return self.prefer.model_dump()
        return {"prefill": 1.0, "decode": self.new_tokens} if self.prefer == "both" else {self.prefer: 1.0}

    def _refuse_other_vocabulary(self, qualities: Mapping[str, Metrics]) -> None:
        """Raises StageFailed where candidates have bits per byte alone: no budget is of those."""
        figures = next(iter(qualities.values()))[RESULT]
        if "bits_per_byte" in figures and "perplexity" not in figures:
            what = f"{self.against!r} has another vocabulary, so that no format's perplexity can be held against its"
            fix = "name the stage that changed the vocabulary, or a later one"
            raise StageFailed("choose-format.against", what, fix)

    def _verdicts(self, context: StageContext) -> tuple[dict[str, list[Verdict]], dict[str, Mapping[str, float]]]:
        """Each candidate's verdicts, and its figures on the other blocks.

        Raises RequirementMissed where none is within the budget.
        """
        from compress.stages.choose.choice import judge

        artifacts = {name: context.inputs[name + QUALITY] for name in self.ways()}
        self._refuse_other_vocabulary({name: artifact.metrics for name, artifact in artifacts.items()})
        halves = {name: _halves(artifact) for name, artifact in artifacts.items()}
        choosing = {name: {RESULT: half.result(), self.against: half.reference()} for name, (half, _) in halves.items()}
        budget = self.budget or Budget.usual(next(iter(choosing.values()))[RESULT])
        requirements = budget.requirements(self.against, self.max_size_mb)
        found = {
            name: judge(requirements, quality, context.inputs[name].size_mb) for name, quality in choosing.items()
        }
        if not any(all(verdict.met for verdict in verdicts) for verdicts in found.values()):
            missed = [
                f"{name}: {verdict.sentence}" for name, verdicts in found.items() for verdict in verdicts
                if not verdict.met
            ]  # fmt: skip
            fix = "allow more, try other schemes, or recover the model before (distill, qat)"
            raise RequirementMissed("choose-format.budget", f"no format is within it ({'; '.join(missed)})", fix)
        return found, {
            name: {**half.result(), "eval_tokens": float(half.num_tokens)} for name, (_, half) in halves.items()
        }


def _halves(measured: Artifact) -> tuple[Evaluation, Evaluation]:
    """What `evaluate` saw on every other block, and on those between; of the dry run's few, on all of them twice."""
    from compress.benchmarks.evaluation import Evaluation

    written = json.loads((measured.path / "evaluation.json").read_text("utf-8"))
    whole = Evaluation.from_json(written["blocks"], round(written["metrics"][RESULT]["eval_tokens"]))
    if len(whole.num_predictions_N) < 2 * _LEAST:
        return whole, whole
    return whole.of_blocks(slice(0, None, 2)), whole.of_blocks(slice(1, None, 2))
