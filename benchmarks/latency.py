"""`latency`: how fast an exported model answers on this machine, beside the source's own exports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field

from compress.artifact import Format, Metrics, write_json
from compress.benchmarks.contest import Budget, Runtime, Workload
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.options import replaced
from compress.stage import SOURCE, Ref, Reporter, Stage, StageContext
from compress.units import UNKEPT, Units

Baseline = Literal["source", "source-int4"]
_VIA: Mapping[Baseline, str] = {"source": "fp32", "source-int4": "int4"}
FIGURES = ("ttft_ms", "prompt_tokens_per_s", "tpot_ms", "latency_ms")
_NOISE = 0.95
"""A chunk that reads a prompt in less than this share of the time is worth naming."""
Count = Annotated[int, Field(ge=1)]


class Latency(Stage):
    """Time to first token, time per token, peak memory and loading time of an ONNX artifact and of its baselines.

    Each model has a process of its own with pinned threads; they take turns, one computing at a time, and ratios are
    taken within a round. An encoder's figure is `latency_ms@N`: the whole forward pass.
    """

    name: ClassVar[str] = "latency"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "time to first token and per token, memory and loading time, beside the source's exports"
    accepts: ClassVar[frozenset[Format]] = frozenset({"onnx"})
    returns: ClassVar[Format] = "measurement"
    plots: ClassVar[Mapping[str, str]] = {"latency.png": "median times, whiskers from the 10th to the 90th percentile"}
    measures_hardware: ClassVar[bool] = True
    libraries: ClassVar[frozenset[str]] = frozenset({"onnxruntime"})
    example: ClassVar[Mapping[str, Any]] = {"prompts": [64]}

    prompts: tuple[Count, ...] = Field((128, 1024), min_length=1, description="prompt lengths in tokens")
    batch_sizes: tuple[Count, ...] = Field((1,), min_length=1, description="rows that are run at once")
    chunk_sizes: tuple[Count, ...] = Field(
        (64, 128, 512),
        description="the result's longest prompt is also read in calls of so many tokens, where it is longer: what its "
        "chunk_size is held against (decoders)",
    )
    new_tokens: int = Field(32, ge=1, description="tokens decoded after each prompt")
    repeats: int = Field(10, ge=3, description="rounds after the warm-up, each measuring every model once")
    max_seconds: float = Field(120, gt=0, description="begin no round that would end later, but run at least 3")
    baselines: tuple[Baseline, ...] = Field(
        ("source", "source-int4"), description="the source's exports that are measured beside it: fp32 and int4"
    )

    def inputs(self) -> Mapping[str, Ref]:
        return {name: Ref(SOURCE, via=(("export-onnx", {"format": _VIA[name]}),)) for name in self.baselines}

    def fitted(self, model: ModelShape) -> Self:
        generates = model.family.kind == "decoder"
        changes = prompts_within(self, model.max_position_embeddings, generates=generates)
        return replaced(super().fitted(model), changes)

    def check(self, model: ModelShape) -> Iterator[Problem]:
        new_tokens = self.new_tokens if model.family.kind == "decoder" else 0
        longest = max(self.prompts) + new_tokens
        if longest > model.max_position_embeddings:
            what = (
                f"{longest} tokens (prompt and new ones), but the model reads at most {model.max_position_embeddings}"
            )
            yield Problem("prompts", what, "shorten the longest prompt")

    def produces(self) -> Sequence[str]:
        figures = [load.figure(what) for load in self.workloads() for what in (FIGURES[:1] if load.chunk else FIGURES)]
        return ["peak_rss_mb", "load_ms", *figures]

    def twin(self) -> Self:
        small = {"prompts": (8,), "chunk_sizes": (), "new_tokens": 2, "repeats": 3, "max_seconds": 1.0}
        return self.model_copy(update=small)

    def workloads(self) -> list[Workload]:
        """Every prompt length at every batch size, then the longest prompt in other chunks."""
        longest = max(self.prompts)
        chunked = [Workload(longest, 1, 0, chunk) for chunk in self.chunk_sizes if chunk < longest]
        loads = [Workload(tokens, batch, self.new_tokens) for batch in self.batch_sizes for tokens in self.prompts]
        return [*loads, *chunked]

    def run(self, context: StageContext) -> Metrics:
        from compress.benchmarks import report

        folders = {"result": context.input.path} | {name: context.inputs[name].path for name in self.baselines}
        found = race(
            folders, self.workloads(), Budget(self.repeats, self.max_seconds),
            threads=context.target.threads, reporter=context.reporter,
            units=Units("latency", context.work / "rounds", log=context.reporter.log),
        )  # fmt: skip
        write_json(context.out / "latency.json", found)
        (context.out / "latency.md").write_text(report.markdown(found), "utf-8")
        report.plot(found, context.out / "latency.png")
        if told := _faster_chunk(found):
            context.reporter.log.warning("latency: %s", told)
        return report.metrics(found)


class Prompts(Protocol):
    """Options that say which prompts are timed."""

    @property
    def prompts(self) -> tuple[int, ...]: ...

    @property
    def new_tokens(self) -> int: ...

    @property
    def model_fields_set(self) -> set[str]: ...


def prompts_within(options: Prompts, positions: int, *, generates: bool) -> dict[str, Any]:
    """What to put in place of defaults that a model of so many positions can't read: prompts that end where it does.

    generates: whether new tokens follow, of which there are a quarter of the positions at most.
    """
    new_tokens, given = options.new_tokens, options.model_fields_set
    changes: dict[str, Any] = {}
    if generates and "new_tokens" not in given and new_tokens > max(positions // 4, 1):
        changes["new_tokens"] = new_tokens = max(positions // 4, 1)
    room = positions - new_tokens if generates else positions
    if "prompts" not in given and max(options.prompts) > room > 0:
        changes["prompts"] = tuple(sorted({min(tokens, room) for tokens in options.prompts}))
    return changes


def _faster_chunk(found: Mapping[str, Any]) -> str:
    """What to say of a chunk that reads the result's longest prompt faster than its own does; `""` where none does."""
    times = {name: each["median"] for name, each in found["subjects"]["result"]["figures"].items()}
    best = min((name for name in times if ",chunk=" in name), key=times.__getitem__, default="")
    prompt, _, chunk = best.partition(",chunk=")
    share = times[best] / times[prompt] if best else 1.0
    if share >= _NOISE:
        return ""
    tokens = prompt.partition("@")[2]
    return f"chunks of {chunk} read a prompt of {tokens} in {share:.2f}x the time: export-onnx: {{chunk_size: {chunk}}}"


def race(
    folders: Mapping[str, Path], workloads: Sequence[Workload], budget: Budget,
    *, threads: int, runtime: Runtime = "ort", reporter: Reporter, units: Units = UNKEPT,
) -> dict[str, Any]:  # fmt: skip
    """Measure the models in `folders` against each other; what was seen, as `latency.json` holds it.

    Ratios are of the first to each other one. units: rounds that they hold, of the same race on the same CPUs, are not
    measured again. Raises StageFailed where a model can't be loaded or run.
    """
    import tempfile

    from compress.benchmarks import report
    from compress.benchmarks.contest import Contestant, hold
    from compress.benchmarks.environment import environment, pick_cpus, warnings_of
    from compress.benchmarks.genai import with_threads
    from compress.benchmarks.rounds import finished

    cpus = pick_cpus(threads)
    surroundings = environment(threads, cpus)
    told = {"runtime": runtime, "threads": threads, "cpus": cpus, "cpu": surroundings["cpu"]}
    units = units.made_of({**told, "models": list(folders), "workloads": list(map(vars, workloads))})
    for warning in warnings_of(surroundings):
        reporter.log.warning("latency: %s", warning)
    with tempfile.TemporaryDirectory() as scratch, reporter.progress("latency", budget.rounds + 1) as advance:
        places = dict(folders)
        if runtime == "genai":
            places = {
                name: with_threads(folder, threads, Path(scratch, str(index)))
                for index, (name, folder) in enumerate(folders.items())
            }
        measured = hold(
            {name: Contestant(folder, runtime) for name, folder in places.items()}, workloads, budget,
            threads=threads, cpus=cpus, vocab_size=smallest_vocabulary(folders.values()), advance=advance,
            units=units, warnings=warnings_of(surroundings),
        )  # fmt: skip
    found = report.assemble(measured, {**surroundings, "runtime": runtime}, folders)
    return report.with_history(found, finished(units))


def smallest_vocabulary(folders: Iterable[Path]) -> int:
    """A number of token ids that all of these models have."""
    sizes = [keys["vocab_size"] for folder in folders for keys in _configs(folder)]
    return min(sizes, default=256)


def num_positions(folder: Path) -> int | None:
    """Tokens that the model in `folder` reads at most, where it says so."""
    named = ("max_position_embeddings", "context_length", "n_positions")
    known = [keys[name] for keys in _configs(folder) for name in named if keys.get(name)]
    return min(known, default=None)


def _configs(folder: Path) -> Iterator[dict[str, Any]]:
    """What transformers' and onnxruntime-genai's configs say of the model."""
    for name in ("config.json", "genai_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text("utf-8"))
            yield config.get("model", config)
