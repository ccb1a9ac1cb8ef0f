"""The command line: its verbs, its exit statuses, and how a failure is told."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
from compress.cli.streams import flush_stdout, settled
from compress.cli.verify import verify
from compress.errors import CompressError, ExitCode
from compress.runner.logs import terminable


class _Verbs(TyperGroup):
    """The verbs, each of which Ctrl-C and SIGTERM end in one line."""

    def invoke(self, ctx: Any) -> Any:
        with terminable():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                raise typer.Exit(ExitCode.INTERRUPTED) from None


app = typer.Typer(
    name="compress", cls=_Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
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


for verb in (check, init, plan, run, show, compare, verify, bench, stages, schema, gc):
    app.command()(verb)
app.command("eval")(evaluate)


def main() -> None:
    """Run the command line and exit."""
    quiet_libraries()
    with settled():
        sys.exit(_status())


def _status() -> int:
    """Run the command line; its exit status."""
    status = 0
    try:
        app()
    except SystemExit as end:
        status = int(end.code or 0)
    except CompressError as error:
        print_problem(error)
        status = error.exit_code
    try:
        flush_stdout()
    except CompressError as error:
        print_problem(error)
        status = status or error.exit_code
    return status


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
