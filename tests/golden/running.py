"""A stage run on one of the cases, and what is seen of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from matplotlib.figure import Figure

from compress.artifact import Artifact, FileEntry, Format, Metrics
from compress.benchmarks import contest, environment
from compress.benchmarks.contest import Budget, Contestant, Measured, Workload
from compress.benchmarks.evaluation import Evaluation
from compress.registry import stage_class
from compress.stage import StageContext, Target
from golden.cases import Case
from golden.models import Text, Workshop

MACHINE = {
    "cpu": "a CPU", "cpu_flags": ["avx2"], "num_cpus": 2, "ram_gb": 8.0, "system": "Linux", "threads": 1, "cpus": [0],
    "governor": None, "load_average": None, "busy_percent": 0.0, "versions": {}, "commit": None,
}  # fmt: skip


def run(stage: str, case: Case, workshop: Workshop, folder: Path) -> Metrics:
    """Run `stage` as the case says, in one thread; what it wrote is in `folder / "out"`."""
    import torch

    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    inputs = {role: _artifact(workshop(name)) for role, name in case.models.items()}
    inputs |= {role: _measured(folder / role, role, each) for role, each in case.figures.items()}
    data: Any = Text()
    context = StageContext(folder / "out", folder / "work", inputs, data, 0, Target(threads=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _still_time():
            return stage_class(stage).model_validate(dict(case.options)).run(context)
    finally:
        torch.set_num_threads(threads)


def _measured(folder: Path, role: str, metrics: Metrics) -> Artifact:
    """What `evaluate` writes where it finds these figures on four blocks of ten tokens, a little less in two."""
    result, tokens = metrics["result"], np.full(4, 10)
    nll = math.log(result["perplexity"])
    means = {
        "nll": nll, "reference_nll": nll - math.log(result["perplexity_ratio"]),
        "kl": result["kl"], "top1_agreement": result["top1_agreement"],
    }  # fmt: skip
    sums = {name: mean * tokens * [1, 0.99, 1, 0.98] for name, mean in means.items()}
    found = Evaluation(tokens, sums, tokens * 0, 44)
    folder.mkdir()
    written = {"metrics": {"result": {**result, "eval_tokens": 44.0}}, "blocks": found.to_json()}
    (folder / "evaluation.json").write_text(json.dumps(written), "utf-8")
    return Artifact(folder, "measurement", role, role, metrics=metrics)


def _artifact(folder: Path) -> Artifact:
    files = {file.name: FileEntry(file.stat().st_size, 0, "") for file in folder.iterdir() if file.is_file()}
    return Artifact(folder, format_of(folder), "source", folder.name, files=files)


def format_of(folder: Path) -> Format:
    """What kind of model is in `folder`."""
    if (folder / "model.onnx").is_file():
        return "onnx"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return "quantized" if "quantization_config" in config else "torch"


@contextmanager
def _still_time() -> Iterator[None]:
    """No process measures, no machine is asked and nothing drawn: times depend on a model's place in the list."""

    def hold(
        contestants: Mapping[str, Contestant], workloads: Sequence[Workload], budget: Budget, **asked: Any
    ) -> dict[str, Measured]:
        measured = {}
        for place, name in enumerate(contestants):
            said = f"asked in {asked['threads']} threads for {asked['vocab_size']} tokens"
            seen = measured[name] = Measured(said, 1.0, 1.0, True, 1.0)
            for load in workloads:
                ms = load.tokens * load.batch * (1 + (2 * place + 1) % 3)
                for what, times in (("ttft_ms", [ms]), ("tpot_ms", [ms / 8] * load.new_tokens)):
                    seen.samples[load.figure(what)] = [times] * budget.rounds
        return measured

    with (
        mock.patch.object(contest, "hold", hold), mock.patch.object(environment, "environment", return_value=MACHINE),
        mock.patch.object(Figure, "savefig", lambda _, file, **__: Path(file).touch()),
    ):  # fmt: skip
        yield
