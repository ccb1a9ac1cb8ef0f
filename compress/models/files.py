"""Files of a model's folder by which its reader would be misled: an adapter, a link to nothing, a name that leads out.

Imports nothing but the standard library: `compress bench` runs where little else is installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TypeGuard

ADAPTER = "adapter_config.json"
"""peft's file, beside the weights of an adapter, that says what model they are to be added to."""


def adapter_problem(folder: Path) -> tuple[str, str] | None:
    """(what is wrong, what to do) where the folder holds an adapter, alone or beside a model: nothing here applies it.

    transformers itself would look for the model that the adapter names, wherever that is.
    """
    if not (folder / ADAPTER).exists():
        return None
    what = f"holds an adapter ({ADAPTER}), which is not applied"
    return what, "merge it into its model first: peft's merge_and_unload, then save_pretrained to another folder"


def link_problem(folder: Path, patterns: Iterable[str]) -> tuple[str, str] | None:
    """(what is wrong, what to do) where a file of the folder that matches one of `patterns` is a link to nothing.

    patterns: `*.json`, `1_Pooling/*.json`: a `*` stands for a part of the last name.
    """
    for pattern in map(PurePosixPath, patterns):
        place = folder / pattern.parent
        for file in sorted(place.iterdir()) if os.path.isdir(place) else ():  # False for a name too long, or with a NUL
            if fnmatchcase(file.name, pattern.name) and file.is_symlink() and not file.exists():
                what = f"has a link to nothing: {file.relative_to(folder)} → {os.readlink(file)}"
                return what, "put the file where the link leads, or a copy in the link's place"
    return None


def stays_inside(name: object) -> TypeGuard[str]:
    """Whether a file's name that a folder's JSON holds is one within that folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
