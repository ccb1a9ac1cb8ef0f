"""How sentence-transformers' files say that a sentence becomes one vector: read here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import CompressError
from compress.fetch.cache import recall
from compress.models.config import FLAG, fault_of
from compress.models.files import stays_inside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODULES = "modules.json"
_USUAL = "1_Pooling"
"""Where a folder without `modules.json` has it."""
_KINDS = ("Transformer", "Pooling", "Normalize")
_MODES: Mapping[str, Literal["mean", "cls"]] = {
    "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls",
}  # fmt: skip
"""What is supported, as sentence-transformers 5.4 writes it, and as it wrote it before."""


@dataclass(frozen=True)
class Pooling:
    """How a sentence becomes one vector: the mean of its tokens or its first one; normalised to length 1 or not."""

    mode: Literal["mean", "cls"] = "mean"
    normalize: bool = False

    def of(self, hidden_BTH: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vectors (B, H) of sequences without padding."""
        pooled_BH: NDArray[np.float32] = hidden_BTH.mean(1) if self.mode == "mean" else hidden_BTH[:, 0]
        return pooled_BH / (pooled_BH**2).sum(1, keepdims=True) ** 0.5 if self.normalize else pooled_BH


def read_pooling(folder: Path) -> Pooling | None:
    """What `modules.json` and the config of the pooling that it names declare; None where nothing is pooled.

    Raises CompressError, naming it, for a module or a mode that is not supported.
    """
    paths = dict(_modules(folder))
    if "Pooling" not in paths:
        return None
    file = folder / paths["Pooling"] / "config.json"
    declared = recall(file)
    if not isinstance(declared, dict):
        what = f"has no readable {file.relative_to(folder)}, which says how sentences are pooled"
        raise CompressError(str(folder), what, "fetch the whole folder")
    modes = _modes(declared, folder, file)
    if len(modes) != 1 or modes[0] not in _MODES:
        named = " and ".join(map(repr, modes))
        what = f"pools sentences by {named} ({file.relative_to(folder)}), which is not supported"
        raise CompressError(str(folder), what, "supported: mean or cls, one of them")
    return Pooling(_MODES[modes[0]], "Normalize" in paths)


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """The kind and the path of each module. Raises CompressError for one that is none of `_KINDS`."""
    modules = recall(folder / MODULES)
    if modules is None and not (folder / MODULES).exists():
        if (folder / _USUAL / "config.json").is_file():
            yield "Pooling", _USUAL
        return
    for module in modules if isinstance(modules, list) else [modules]:
        entry = module if isinstance(module, dict) else {}
        kind, path = str(entry.get("type")).rpartition(".")[2], entry.get("path", "")
        if kind not in _KINDS:
            what = f"has a module {kind} ({MODULES}), which is not supported: its vectors would be others"
            raise CompressError(str(folder), what, f"supported: {', '.join(_KINDS)}")
        if not stays_inside(path):
            raise CompressError(str(folder), f"has a module at {path!r} ({MODULES})", "name a folder inside of it")
        yield kind, path


def _modes(declared: Mapping[str, Any], folder: Path, file: Path) -> list[str]:
    """The modes that a pooling's config turns on, sorted; the mean where it says nothing of any.

    Raises CompressError for a switch that is neither on nor off.
    """
    said = declared.get("pooling_mode")
    if said is not None:
        return [str(mode) for mode in (said if isinstance(said, list) else [said])]
    start = "pooling_mode_"
    flags = {key.removeprefix(start): value for key, value in declared.items() if key.startswith(start)}
    for mode, on in flags.items():
        if fault := fault_of(f"{start}{mode}", on, FLAG):
            raise CompressError(str(folder), f"has a {file.relative_to(folder)} whose {fault}", "correct it")
    return sorted(mode for mode, on in flags.items() if on) if flags else ["mean"]
