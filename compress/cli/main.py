"""The command line: its verbs, its exit statuses, and how a failure is told."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from compress import __version__
from compress.cli.bench import bench
from compress.cli.check import check
from compress.cli.compare import compare
from compress.cli.eval import evaluate
from compress.cli.gc import gc
from compress.cli.init import init
from compress.cli.plan import plan
from compress.cli.run import run
from compress.cli.schema import schema
from compress.cli.screen import print_problem
from compress.cli.show import show
from compress.cli.stages import stages
from compress.errors import CompressError

app = typer.Typer(
    name="compress", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 a stage failed, 2 invalid input and nothing ran, 3 a requirement was missed, "
    "130 interrupted.",
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take a pretrained transformer to a smaller, faster, measured ONNX folder.

    A pipeline file declares a model, the stages that it goes through (prune, distil, quantise, export, measure) and
    what must hold of the result. `compress init MODEL` writes one to begin with, `compress run FILE` runs it.
    """


for verb in (check, init, plan, run, show, compare, bench, stages, schema, gc):
    app.command()(verb)
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line and exit."""
    quiet_libraries()
    try:
        app()
    except CompressError as error:
        print_problem(error)
        sys.exit(error.exit_code)


def quiet_libraries() -> None:
    """Keep other libraries' bars and advice off the screen, here and in the processes that stages start.

    They read this when they are imported: call it before. TQDM_DISABLE reaches bars that no library's own switch does.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)
