"""A model out of a published package: finding it there, unpacking it, and writing down where it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import CompressError
from compress.fetch.packages import Downloader, Package, fetch
from compress.models.gguf import convert

_LICENCES = ("*.dist-info/LICENSE*", "*.dist-info/NOTICE*", "*.dist-info/licenses/*", "package/LICENSE*",
             "package/NOTICE*")  # fmt: skip
_METADATA = ("*.dist-info/METADATA", "package/package.json")
_READ = (".safetensors", ".json", ".txt", ".jinja", ".model", ".md")


def unpack_model(package: Package, out: Path, download: Downloader) -> str:
    """Put the model that `package.path` names into `out` as a `save_pretrained` folder; the archive's SHA-256.

    The package's licence comes along, and a card says where it is from.
    """
    with TemporaryDirectory(prefix="compress-") as name:
        unpacked = Path(name)
        members: list[str] = []

        def choose(names: Sequence[str]) -> set[str]:
            members.append(find_member(names, package))
            return {name for name in names if _wanted(name, members[0])}

        sha256 = fetch(package, unpacked, choose, download)
        found = unpacked / members[0]
        if found.is_dir():
            shutil.copytree(found, out, dirs_exist_ok=True)
        else:
            convert(found, out)
        licence = _copy_licence(unpacked, out)
        _write_card(package, sha256, licence, found, out / "README.md")
    return sha256


def find_member(names: Sequence[str], package: Package) -> str:
    """The file or folder of the archive that `package.path` names, from its root or from within its import package.

    Raises CompressError, listing the models that there are, where it names none or several.
    """
    folders = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"}
    known = {*names, *folders}
    exact = package.root + package.path
    if exact in known:
        return exact
    ending = [name for name in known if name.endswith("/" + package.path)]
    if len(ending) == 1:
        return ending[0]
    models = [name for name in names if name.endswith(".gguf")]
    models += [name.rpartition("/")[0] for name in names if name.endswith("/config.json")]
    there = ", ".join(sorted({name.removeprefix(package.root) for name in models or names})[:8])
    what = f"{package} has {'no' if not ending else 'more than one'} {package.path!r}"
    raise CompressError(package.uri, what, f"it has: {there}")


def _wanted(name: str, member: str) -> bool:
    if name == member or any(fnmatchcase(name, pattern) for pattern in (*_LICENCES, *_METADATA)):
        return True
    return name.startswith(member + "/") and (name.endswith(_READ) or name.rpartition("/")[2].startswith("LICENSE"))


def _copy_licence(unpacked: Path, out: Path) -> str:
    """Copy the package's licence files to `out`; the licence that its metadata names."""
    stated = None
    for pattern in _LICENCES:
        for file in unpacked.glob(pattern):
            shutil.copyfile(file, out / file.name)
    for pattern in _METADATA:
        for file in unpacked.glob(pattern):
            stated = _licence_in(file)
    return stated or "not stated"


def _write_card(package: Package, sha256: str, licence: str, found: Path, card: Path) -> None:
    """Say in `card`, after what it says already, where the model came from."""
    text = card.read_text("utf-8").rstrip() if card.is_file() else f"# {Path(package.path).stem}"
    text += f"""

## Where this model came from

- source: `{package.uri}`
- package: {package.name} {package.version} ({package.scheme}), SHA-256 of its archive `{sha256}`
- licence, as the package states it: {licence}
"""
    if found.is_file():
        text += f"- converted: the weights of `{found.name}` dequantised to float32, the tokenizer rebuilt from it\n"
    card.write_text(text, "utf-8")


def _licence_in(metadata: Path) -> str | None:
    text = metadata.read_text("utf-8", errors="replace")
    if metadata.name == "package.json":
        return str(json.loads(text).get("license") or "") or None
    header = text.partition("\n\n")[0]
    fields = dict(line.partition(": ")[::2] for line in header.splitlines() if ": " in line)
    return fields.get("License-Expression") or fields.get("License")
