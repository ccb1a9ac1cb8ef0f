"""`compress schema`: the pipeline file's JSON Schema, for editors."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON Schema of the pipeline file, made from the installed stages.

    Save it and name it in the first line of a pipeline file; editors with a YAML language server then complete and
    check while you type:

        compress schema > pipeline.schema.json

        # yaml-language-server: $schema=pipeline.schema.json
    """
    from compress.pipeline.schema import file_schema

    print(json.dumps(file_schema(), indent=1))
