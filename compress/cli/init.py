"""`compress init`: a pipeline file to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.errors import InvalidInput


def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or pypi://package/version/file.gguf.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("pipeline.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Write a commented pipeline file for MODEL: prune, distil, export as int4, measure, and what must hold.

    The options fit the model where its config.json is at hand. The file passes `compress check` as it is; change what
    you like and check it again.
    """
    from compress.models.anatomy import shape_of
    from compress.models.sources import parse_source
    from compress.pipeline.starter import starter

    config = parse_source(model, "MODEL").config()
    shape = None if config is None else shape_of(config, "MODEL")
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(starter(model, str(output), shape))
    except FileExistsError as error:
        raise InvalidInput(str(output), "is there already", "name another with --output, or give --force") from error
    except OSError as error:
        raise InvalidInput(str(output), f"can't be written ({error.strerror})", "name another with --output") from error
    print(output)
