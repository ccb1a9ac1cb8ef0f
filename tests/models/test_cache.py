from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from compress.errors import CompressError
from compress.fetch.cache import ensure, entry_path, file_sha256, finished


def slow_build(out: Path) -> dict[str, int]:
    (out / "first").write_text("1")
    time.sleep(0.3)
    (out / "second").write_text(str(os.getpid()))
    with (out.parent / "builds").open("a") as log:
        log.write("x")
    return {"builder": os.getpid()}


def want_entry(cache: Path) -> None:
    os.environ["COMPRESS_CACHE"] = str(cache)
    ensure("kind", "one", slow_build)


def test_processes_that_want_one_entry_build_it_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=want_entry, args=(cache,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert (cache / "kind" / "builds").read_text() == "x"
    facts = finished(entry_path("kind", "one"))
    assert facts is not None
    assert (entry_path("kind", "one") / "second").read_text() == str(facts["builder"])


def test_a_killed_build_leaves_nothing_that_is_used(cache: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=want_entry, args=(cache,))
    process.start()
    unfinished = entry_path("kind", "one").with_name(entry_path("kind", "one").name + ".unfinished")
    while not (unfinished / "first").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert finished(entry_path("kind", "one")) is None
    entry = ensure("kind", "one", slow_build)
    assert sorted(file.name for file in entry.iterdir()) == ["cache.json", "first", "second"]
    assert not unfinished.exists()


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def build(out: Path) -> dict[str, str]:
        (out / "half").write_text("half")
        raise CompressError("here", "went wrong")

    with pytest.raises(CompressError, match="went wrong"):
        ensure("kind", "one", build)
    assert list(cache.rglob("half")) == []


@pytest.mark.parametrize("damage", ["truncate", "same size", "remove", "manifest"])
def test_a_damaged_entry_is_built_again(cache: Path, damage: str) -> None:
    def build(out: Path) -> dict[str, str]:
        (out / "file").write_text("content")
        return {}

    entry = ensure("kind", "one", build)
    if damage == "manifest":
        (entry / "cache.json").write_text("{")
    elif damage == "remove":
        (entry / "file").unlink()
    else:
        (entry / "file").write_text("cont" if damage == "truncate" else "CONTENT")
    assert finished(entry) is None
    assert (ensure("kind", "one", build) / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space is left"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is left"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "can't be written"),
    ],
)
def test_a_full_or_unwritable_disk_is_one_clear_message(error: Exception, expected: str) -> None:
    def build(out: Path) -> dict[str, str]:
        raise error

    with pytest.raises(CompressError, match=expected):
        ensure("kind", "one", build)


def test_a_file_in_the_place_of_the_cache_is_one_clear_message(cache: Path) -> None:
    cache.write_text("not a folder")
    with pytest.raises(CompressError, match=r"can't be written \(Not a directory\); set COMPRESS_CACHE"):
        ensure("kind", "one", slow_build)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_text("one")
    young = file_sha256(file)
    monkeypatch.setattr("compress.fetch.cache._RACY_NS", -1)
    assert file_sha256(file) == young
    monkeypatch.setattr("compress.fetch.cache._sha256", lambda file: "computed again")
    assert file_sha256(file) == young
    file.write_text("two")  # the same size
    assert file_sha256(file) == "computed again"


def test_a_young_file_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("one")
    file_sha256(file)
    assert not cache.exists()
