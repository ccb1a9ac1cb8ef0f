"""`compress eval`: how well a model predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from compress.benchmarks.recall import Recall


USUAL_LENGTH = 256


def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A torch, quantised or ONNX model with its tokenizer.")
    ],
    text: Annotated[
        str, typer.Option("--text", help="What to read: a file, folder or glob, or any other spec of `data:`.")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", help="A second model to measure the distance from, on the same text.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens to read, spread evenly over the text.")] = 8192,
    sequence_length: Annotated[
        int | None, typer.Option(min=4, help="Tokens in one block, read on its own: 256, or all that a model reads.")
    ] = None,
    recall: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", min=256, help="Also ask for recall over a context this long. Repeatable."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for an ONNX model.")] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures, and those of each block, as JSON.")
    ] = False,
) -> None:
    """Measure the perplexity of the model in FOLDER on a text, with its standard error over blocks.

    With --against it also tells how far the model is from the other one: KL divergence of their predictions, how often
    they agree on the next token, and the ratio of their perplexities, paired block by block.

    --recall adds what short texts hide: MQAR (16 pairs of words, stated and asked for again), a needle (one fact in a
    text, at three depths) and perplexity by position, over contexts of so many tokens.

        compress eval runs/quickstart/07-export-onnx-…  --text novel.txt --against models/smollm2
    """
    from compress.cli.screen import print_json, print_table, reporting
    from compress.hardware import check_threads
    from compress.models.folder import files_problem
    from compress.report.tables import Table

    for place in filter(None, (folder, against)):
        if not place.is_dir():
            raise InvalidInput(str(place), "is no directory", "name a folder with a model")
        if problem := files_problem(place):
            raise InvalidInput(str(place), *problem)

    check_threads(threads, "--threads")
    asked = _recall(tuple(recall), folder) if recall else None

    from compress.benchmarks.judging import judge
    from compress.benchmarks.latency import num_positions
    from compress.benchmarks.text import OneText

    known = [limit for place in filter(None, (folder, against)) if (limit := num_positions(place))]
    if sequence_length is None:
        sequence_length = min([USUAL_LENGTH, *known])
    elif sequence_length > min(known, default=sequence_length):
        what = f"{sequence_length} tokens, but a model here reads at most {min(known)}"
        raise InvalidInput("--sequence-length", what, f"at most {min(known)}")
    with reporting() as reporter:
        found = judge(
            folder, against, OneText(text),
            sequence_length=sequence_length, max_tokens=tokens, threads=threads, reporter=reporter, recall=asked,
        )  # fmt: skip
    figures = {str(folder): found.result()} | ({str(against): found.reference()} if against else {})
    if as_json:
        print_json({"figures": figures, "sequence_length": sequence_length, "blocks": found.to_json()})
        return
    names = [name for name in figures[str(folder)] if not name.endswith("_se")]
    rows = [(name, *(_with_error(values, name) for values in figures.values())) for name in names]
    title = f"{text}: {len(found.num_predictions_N)} blocks of {sequence_length} tokens, ± standard error"
    print_table(Table(title, ("", *figures), tuple(rows)))


def _recall(contexts: tuple[int, ...], folder: Path) -> Recall:
    """The recall tasks over these contexts. Raises InvalidInput where the model in `folder` can't be asked."""
    from compress.benchmarks.recall import Recall
    from compress.models.anatomy import shape_of
    from compress.models.folder import config_of

    asked, config = Recall.model_validate({"contexts": contexts}), config_of(folder)
    problems = asked.problems(shape_of(config)) if config else ()
    if found := [Problem(f"--recall {folder}", problem.what, problem.fix) for problem in problems]:
        raise InvalidInput.of(found)
    return asked


def _with_error(values: dict[str, float], name: str) -> str:
    if name not in values:
        return ""
    error = f" ± {values[f'{name}_se']:.2g}" if f"{name}_se" in values else ""
    return f"{values[name]:.4g}{error}"
