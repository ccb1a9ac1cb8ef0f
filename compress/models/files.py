"""Files of a model's folder by which its reader would be misled: an adapter, a link to nothing, a name that leads out.

Imports nothing but the standard library: `compress bench` runs where little else is installed.
"""

from __future__ import annotations

from pathlib import Path

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
