"""`compress bench`: how fast one or several ONNX folders are on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.errors import CompressError, InvalidInput

PLOTS = (".png", ".svg", ".pdf")
GRAPHS = ("*.onnx", "*.onnx[._]data", "*.data", "*config.json")
"""What is read of a folder, as far as names tell it: a graph names the files of its weights itself."""


def bench(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Folders with an ONNX model, whoever made them.")
    ],
    prompts: Annotated[
        str | None, typer.Option(metavar="N,N…", help="Prompt lengths in tokens: 128,1024, as far as the models read.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N…", help="Batch sizes.")] = "1",
    threads: Annotated[int, typer.Option(min=1, help="Threads, pinned to as many CPUs.")] = 2,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens decoded after each prompt: 32, or fewer for a model of few.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds after the warm-up.")] = 10,
    max_seconds: Annotated[float, typer.Option(help="Begin no round that would end later, but run 3.")] = 120,
    runtime: Annotated[Literal["ort", "genai"], typer.Option(help="Bare ONNX Runtime, or onnxruntime-genai.")] = "ort",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw a plot to FILE (.png or .svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was measured as JSON.")] = False,
) -> None:
    """Measure time to first token, time per token, peak memory and loading time of one or several ONNX folders.

    Any folder with a decoder or an encoder will do: an export of this tool, onnxruntime-genai's builder's, optimum's.
    Each has a process of its own with pinned threads; they take turns, one computing at a time, so that several named
    at once can be compared. Ratios are of the first folder to each other one.

        compress bench out/ours out/theirs --prompts 128,1024 --threads 2
    """
    from compress.cli.screen import print_json, print_line, print_table, reporting
    from compress.hardware import check_threads
    from compress.models.files import adapter_problem, link_problem
    from compress.options import replaced
    from compress.runtime.session import graph_file

    for folder in folders:
        if not any(folder.glob("*.onnx")):
            raise InvalidInput(str(folder), "has no ONNX model", "name a folder with a .onnx file")
        if problem := adapter_problem(folder) or link_problem(folder, GRAPHS):
            raise InvalidInput(str(folder), *problem)
        try:
            graph_file(folder)
        except CompressError as error:
            raise InvalidInput.of([error.problem]) from error
    given: dict[str, object] = {"prompts": _counts(prompts, "--prompts")} if prompts is not None else {}
    given |= {"new_tokens": new_tokens} if new_tokens is not None else {}
    batch_sizes = _counts(batch, "--batch")
    check_threads(threads, "--threads")
    _check_installed(runtime, plot)

    from compress.benchmarks import report
    from compress.benchmarks.contest import Budget, Workload
    from compress.benchmarks.latency import Latency, num_positions, prompts_within, race

    known = {folder: limit for folder in folders if (limit := num_positions(folder))}
    asked = Latency.model_validate(given)
    asked = replaced(asked, prompts_within(asked, min(known.values()), generates=True) if known else {})
    for folder, limit in known.items():
        if max(asked.prompts) > limit:
            what = f"{max(asked.prompts)} tokens, but the model in {folder} reads at most {limit}"
            raise InvalidInput("--prompts", what, f"at most {limit}")
    loads = [Workload(length, rows, asked.new_tokens) for rows in batch_sizes for length in asked.prompts]
    with reporting() as reporter:
        found = race(
            _named(folders), loads, Budget(repeats, max_seconds), threads=threads, runtime=runtime, reporter=reporter
        )
        if as_json:
            print_json(found)
        else:
            print_table(report.table(found))
            print_line(report.footnote(found))
        if plot is not None:  # last: what was measured is out by then
            report.plot(found, plot)


def _check_installed(runtime: str, plot: Path | None) -> None:
    """Raise InvalidInput for what can't be had, now and not after minutes of measuring."""
    if runtime == "genai" and find_spec("onnxruntime_genai") is None:
        raise InvalidInput("--runtime genai", "onnxruntime-genai is not installed", "pip install onnxruntime-genai")
    if plot is None:
        return
    if find_spec("matplotlib") is None:
        raise InvalidInput("--plot", "matplotlib, which draws it, is not installed", "pip install matplotlib")
    if plot.suffix.lower() not in PLOTS:
        raise InvalidInput("--plot", f"{str(plot)!r} is no {', '.join(PLOTS)}", "name a file that ends so")
    if not plot.parent.is_dir() or plot.is_dir():
        raise InvalidInput("--plot", f"{str(plot)!r} can't be a file", "name a file in a folder that is there")


def _counts(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise InvalidInput(option, f"{text!r} is no list of whole numbers above 0", f"write {option} 128,1024")
    return numbers


def _named(folders: list[Path]) -> dict[str, Path]:
    """Folders by the shortest name that tells them apart."""
    names = [folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, folders, strict=True)
    }
