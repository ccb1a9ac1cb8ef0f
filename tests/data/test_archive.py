from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from packed import write_tgz, write_zip

from compress.errors import CompressError
from compress.fetch.archive import unpack


def everything(name: str) -> bool:
    return True


@pytest.mark.parametrize("write", [write_zip, write_tgz])
def test_only_wanted_members_are_unpacked_and_all_are_named(tmp_path: Path, write) -> None:
    archive = write(tmp_path / "archive", {"a/b.txt": b"one", "c.txt": b"two"})
    names = unpack(archive, tmp_path / "out", lambda name: name.startswith("a/"))
    assert names == ["a/b.txt", "c.txt"]
    assert [file.read_bytes() for file in (tmp_path / "out").rglob("*.txt")] == [b"one"]


@pytest.mark.parametrize("write", [write_zip, write_tgz])
@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/etc/out.txt", "C:/out.txt", "a\\..\\..\\out.txt"])
def test_a_path_that_leaves_the_folder_is_refused_even_where_it_is_not_wanted(tmp_path: Path, write, name: str) -> None:
    archive = write(tmp_path / "archive", {name: b"x"})
    with pytest.raises(CompressError, match="unsafe path"):
        unpack(archive, tmp_path / "out", lambda name: False)
    assert list(tmp_path.rglob("out.txt")) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_a_link_or_device_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(CompressError, match="link or a device"):
        unpack(tmp_path / "a.tgz", tmp_path / "out", everything)
    assert not (tmp_path / "out").exists()


def test_a_zip_with_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(CompressError, match="link or a device"):
        unpack(tmp_path / "a.whl", tmp_path / "out", everything)


@pytest.mark.parametrize("write", [write_zip, write_tgz])
def test_a_bomb_is_refused_before_it_is_written(tmp_path: Path, write) -> None:
    archive = write(tmp_path / "archive", {"zeros": bytes(5_000_000)})
    assert archive.stat().st_size < 50_000
    with pytest.raises(CompressError, match="more than 1 MB"):
        unpack(archive, tmp_path / "out", everything, max_bytes=1_000_000)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # zipfile's own, while the test writes it
@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b")])
def test_names_that_clash_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    with pytest.raises(CompressError, match=r"twice|of one name"):
        unpack(tmp_path / "a.whl", tmp_path / "out", everything)


@pytest.mark.parametrize("write", [write_zip, write_tgz])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
def test_a_truncated_archive_is_one_clear_message(tmp_path: Path, write, share: float) -> None:
    noise = bytes(i * i * 7919 % 251 for i in range(40_000))
    archive = write(tmp_path / "archive", {f"{i}.bin": noise[i:] for i in range(10)})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CompressError, match="damaged archive"):
        unpack(archive, tmp_path / "out", everything)


def test_a_flipped_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.whl", {"a.bin": bytes(range(256)) * 20})
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(CompressError, match="damaged archive"):
        unpack(archive, tmp_path / "out", everything)
