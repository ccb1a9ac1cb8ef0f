"""What a stage's artifact depends on, and the key that is made of it.

Everything that can make another artifact is an ingredient, and nothing else is: not an option that is off, a seed that
is not used, a text that is not read. The ingredients stay in `artifact.json`, so that a change can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from compress.hardware import minor_version, this_machine
from compress.options import counted
from compress.stage import Given, Stage, Target

Ingredients = Mapping[str, Any]
"""By their kind, as JSON has them: `options`, `inputs`, `text`, `libraries` and the like."""


def ingredients_of(
    stage: Stage, given: Given, inputs: Mapping[str, str], *, text: Mapping[str, str], seed: int, target: Target
) -> Ingredients:
    """All that the artifact of `stage` depends on.

    inputs: keys by role. text: digests of the splits that it reads. The seed counts where the stage `uses_seed`; the
    target where it `reads_target` or `measures_hardware`; the machine where it measures hardware, and the vector
    instructions alone where its arithmetic is rounded.
    """
    found: dict[str, Any] = {
        "stage": stage.name,
        "version": stage.version,
        "options": stage.settled(given),
        "inputs": inputs,
        "text": text,
        "libraries": {library: minor_version(library) for library in stage.computes_with(given)},
    }
    if stage.uses_seed():
        found["seed"] = seed
    if stage.reads_target or stage.measures_hardware:
        found["target"] = target.model_dump()
    if stage.measures_hardware:
        found["machine"] = this_machine().fingerprint()
    elif stage.depends_on_cpu(given):
        found["machine"] = {"flags": this_machine().vector_flags}
    plain: Ingredients = json.loads(_json(found))
    return plain


def key_of(value: object) -> str:
    """SHA-256 (hex) of ingredients, or of whatever else JSON can hold."""
    return hashlib.sha256(_json(value).encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_plain)


def _plain(value: object) -> object:
    """What JSON has no word for, in an order that does not depend on the process."""
    if isinstance(value, BaseModel):
        return counted(value)
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else str(value)
