"""What must hold of the result: `perplexity: "<= 1.05x source"`, `size_mb: "<= 90"`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from pydantic import ValidationError

from compress.errors import InvalidInput, Problem
from compress.pipeline.document import shown
from compress.registry import did_you_mean, stage_class, stage_names
from compress.stage import INPUT, SOURCE

if TYPE_CHECKING:
    from compress.models.anatomy import ModelShape
    from compress.pipeline.graph import Graph, GraphNode

Operator = Literal["<=", ">=", "<", ">"]
RESULT = "result"
"""The subject of a figure that a stage measured on its own artifact (or, for a measurement, on its input)."""
MODEL_FIGURES = ("parameters", "size_mb")
"""What is measured of every artifact that holds a model, the source among them."""
DISTANCES = frozenset({"kl", "top1_agreement", "cosine", "perplexity_ratio", "bits_per_byte_ratio"})
"""Figures that compare two models already, so that a baseline has none of its own."""
OF_TOKENS = ("perplexity", "perplexity_ratio", "kl", "top1_agreement")
"""Figures that can't be compared between models with different vocabularies: bits per byte stand in their place."""

_TASKS: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("causal", "masked"), "perplexity_ratio": ("causal", "masked"),
    "bits_per_byte": ("causal",), "bits_per_byte_ratio": ("causal",),
    "kl": ("causal", "masked", "classification"), "top1_agreement": ("causal", "masked", "classification"),
    "cosine": ("embedding",),
}  # fmt: skip
"""What `evaluate` measures of which task's models."""
_KINDS = {"ttft_ms": "decoder", "tpot_ms": "decoder", "prompt_tokens_per_s": "decoder", "latency_ms": "encoder"}
"""What `latency` measures of which kind's models."""

_HOLDS: Mapping[Operator, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
COMPARISON_PATTERN = r"(<=|>=|<|>)\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(?:[x×]\s+(\S+))?"
"""Operator, number, baseline."""
_HOW = 'write "<= 90" or "<= 1.05x source"'


@dataclass(frozen=True)
class Requirement:
    """One line of `require`. With a `baseline`, `number` is a factor of that subject's figure; without, the limit."""

    metric: str
    operator: Operator
    number: float
    baseline: str
    place: str

    def __str__(self) -> str:
        return f"{self.operator} {self.number:g}" + (f"x {self.baseline}" if self.baseline else "")

    def verdict(self, figures: Mapping[str, Mapping[str, float]]) -> Verdict:
        """Compare the figures by subject (`result`, `source`, stage ids) with this; a missing one is a miss."""
        measured = figures.get(RESULT, {}).get(self.metric)
        limit: float | None = self.number
        if self.baseline:
            base = figures.get(self.baseline, {}).get(self.metric)
            limit = None if base is None else self.number * base
        met = measured is not None and limit is not None and _HOLDS[self.operator](measured, limit)
        return Verdict(self, measured, limit, met)


@dataclass(frozen=True)
class Verdict:
    """Whether a requirement is met: what was measured, the limit in the metric's own unit (None: not measured)."""

    requirement: Requirement
    measured: float | None
    limit: float | None
    met: bool

    @property
    def metric(self) -> str:
        """The figure's name."""
        return self.requirement.metric

    @property
    def over(self) -> float:
        """How far beyond the limit, as a share of it: 0.1 is missed by 10 %, −0.1 met with 10 % to spare."""
        if self.measured is None or not self.limit:
            return math.nan
        return (self.measured / self.limit - 1) * (1 if self.requirement.operator[0] == "<" else -1)

    @property
    def sentence(self) -> str:
        """The whole in words: `perplexity 20.1, required <= 19.0 (1.05x source): missed by 5.8 %`."""
        need = self.requirement
        if self.measured is None or self.limit is None:
            missing = "it" if self.measured is None else f"that of {need.baseline}"
            return f"{self.metric}: required {need}, but {missing} was not measured"
        origin = f" ({need.number:g}x {need.baseline})" if need.baseline else ""
        share = "" if math.isnan(self.over) else f"{abs(self.over):.1%}"
        verdict = f"met, {share} to spare" if self.met else f"missed by {share}"
        return f"{self.metric} {self.measured:.4g}, required {need.operator} {self.limit:.4g}{origin}: {verdict}"


def parse_requirement(metric: str, comparison: object, place: str) -> Requirement:
    """One line of `require`. Raises InvalidInput for what is no comparison."""
    if not isinstance(comparison, str):
        fix = f'write "<= {comparison}"' if isinstance(comparison, int | float) and comparison == comparison else _HOW
        raise InvalidInput(place, f"must be a comparison in quotes, got {shown(comparison)}", fix)
    match = re.fullmatch(COMPARISON_PATTERN, comparison.strip())
    if match is None:
        raise InvalidInput(place, f"is no comparison: {shown(comparison)}", _HOW)
    sign, number, baseline = match.groups()
    if not math.isfinite(float(number)):
        raise InvalidInput(place, f"compares with a number that is too large: {shown(comparison)}", _HOW)
    return Requirement(metric, cast(Operator, sign), float(number), baseline or "", place)


def unproven(graph: Graph, requirements: Sequence[Requirement]) -> list[Problem]:
    """The requirements whose figure no stage of the graph measures, or not of their baseline."""
    subjects = _subjects(graph)
    incomparable = {name for node in graph.nodes if not node.hidden for name in _incomparable(graph, node)}
    problems = []
    for need in requirements:
        measured = subjects.get(need.metric, {})
        if RESULT not in measured and (problem := _without(graph, need)):
            problems.append(problem)
        elif RESULT not in measured and need.metric in incomparable:
            what = f"{need.metric} can't be compared between models with different vocabularies"
            fix = 'give bits_per_byte: "<= 1.05x source", or bits_per_byte_ratio'
            problems.append(Problem(need.place, what, fix))
        elif RESULT not in measured:
            what = f"no stage here measures {shown(need.metric)}"
            problems.append(Problem(need.place, what, _who_measures(need.metric, subjects)))
        elif need.baseline and len(namesakes := _namesakes(graph, need.baseline)) > 1:
            what = f"{need.baseline!r} may mean {' or '.join(map(repr, namesakes))}"
            problems.append(Problem(need.place, what, "give the one that is meant an `id:` of its own"))
        elif need.baseline and need.baseline not in measured:
            what = f"no stage measures {need.metric} of {shown(need.baseline)}"
            fix = did_you_mean(need.baseline, measured.keys() - {RESULT})
            if need.metric in DISTANCES:
                fix = f'it compares two models already: give a limit alone, as "{need.operator} {need.number:g}"'
            problems.append(Problem(need.place, what, fix))
    return problems


def lacks(model: ModelShape | None, figure: str) -> bool:
    """Whether a model of that shape has no such figure, whoever measures; False where the shape is not known."""
    if model is None:
        return False
    name = figure.partition("@")[0].removesuffix("_se")
    if name in _KINDS:
        return _KINDS[name] != model.family.kind
    return name in _TASKS and model.head is not None and model.head.task not in _TASKS[name]


def _without(graph: Graph, need: Requirement) -> Problem | None:
    """What is wrong where a stage would measure the figure if the model were of another kind."""
    for node in graph.nodes:
        if node.shape and not node.hidden and need.metric in node.stage.produces() and lacks(node.shape, need.metric):
            has = [name for name in _TASKS if not name.endswith("_ratio") and not lacks(node.shape, name)]
            latency = "ttft_ms, tpot_ms" if node.shape.family.kind == "decoder" else "latency_ms"
            what = f"a model of this kind ({node.shape.model_type}{_ending(node.shape)}) has no {need.metric}"
            return Problem(need.place, what, f"it has {', '.join(has)}, and {latency} of each prompt")
    return None


def _ending(model: ModelShape) -> str:
    return f" …{model.head.suffix}" if model.head else ""


def measured_early(graph: Graph, requirements: Sequence[Requirement]) -> Iterator[Problem]:
    """Requirements that hold of an artifact before the last: no fault, but worth a word."""
    subjects = _subjects(graph)
    for need in requirements:
        last = subjects.get(need.metric, {}).get(RESULT)
        if last is not None and last != graph.result:
            what = f"{need.metric} is last measured of {last!r}, and the result is {graph.result!r}"
            yield Problem(need.place, what, "measure after the last stage if it is the result that must hold")


def _subjects(graph: Graph) -> dict[str, dict[str, str]]:
    """By figure, of which subjects it is measured, and the id of the artifact that each subject last stood for."""
    found: dict[str, dict[str, str]] = {name: {SOURCE: SOURCE} for name in MODEL_FIGURES}
    for node in graph.nodes:
        if node.hidden:
            continue
        measures = node.stage.returns == "measurement"
        artifact = node.inputs[INPUT] if measures else node.id
        subjects = dict.fromkeys((RESULT, artifact, node.id), artifact)
        # a measurement's other roles are what it measures beside its input
        beside = {role: id_ for role, id_ in node.inputs.items() if measures and role != INPUT}
        measured = {name for name in node.stage.produces() if not lacks(node.shape, name)}
        measured -= set(_incomparable(graph, node))
        for name in (*(() if measures else MODEL_FIGURES), *measured):
            found.setdefault(name, {}).update(subjects if name in DISTANCES else subjects | beside)
    return found


def _incomparable(graph: Graph, node: GraphNode) -> Iterator[str]:
    """The figures that a measurement can't take, since what it compares its input with has another vocabulary."""
    if node.stage.returns != "measurement":
        return
    shapes = {SOURCE: graph.source_shape} | {other.id: other.shape for other in graph.nodes}
    sizes = {shape.vocab_size for id_ in node.inputs.values() if (shape := shapes.get(id_)) is not None}
    if len(sizes) > 1:
        yield from (name for each in OF_TOKENS for name in (each, f"{each}_se"))


def _namesakes(graph: Graph, name: str) -> list[str]:
    """The ids of the stages called `name`, where the file left it to us to number them."""
    ids = [node.id for node in graph.nodes if node.stage.name == name and not node.hidden]
    return ids if f"{name}-2" in ids else []


def _who_measures(metric: str, subjects: Mapping[str, object]) -> str:
    for name in stage_names():
        try:
            produced = stage_class(name)().produces()
        except ValidationError:  # a stage that has no defaults for all of its options
            continue
        if metric in produced:
            return f"add a {name!r} stage"
    return did_you_mean(metric, subjects)
