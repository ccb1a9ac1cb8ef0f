"""Published packages made in a test: archives as pip and npm hand them over, and clients that hand them over."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from compress.fetch.packages import Downloader, Package


def write_zip(archive: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return archive


def write_tgz(archive: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(archive, "w:gz") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return archive


class Registry:
    """Stands in for pip and npm: hands over archives of `members`, and counts how often."""

    def __init__(self, members: Mapping[str, bytes], *, truncate: bool = False) -> None:
        self.members, self.truncate = members, truncate
        self.num_downloads = 0

    def __call__(self, package: Package, folder: Path) -> Path:
        self.num_downloads += 1
        archive = (
            write_zip(folder / "it.whl", self.members)
            if package.scheme == "pypi"
            else write_tgz(folder / "it.tgz", {f"package/{name}": data for name, data in self.members.items()})
        )
        if self.truncate:
            archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        return archive


def no_download(package: Package, folder: Path) -> Path:
    raise AssertionError(f"{package} is downloaded")


_: Downloader = no_download
