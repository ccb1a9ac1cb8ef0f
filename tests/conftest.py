"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import pico`, also in the subprocesses that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest's workers share the cores

from compress.cli.main import quiet_libraries

quiet_libraries()

from wheels import build_wheel  # noqa: E402

from pico import make_pico  # noqa: E402 (what it imports reads the environment)


def pytest_collection_finish() -> None:
    """A training ends with a collection of garbage: it need not look at all the modules that are imported by now."""
    gc.freeze()


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """What a test opens in this process (onnxruntime-genai, a worker's session) decides for no other test."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pico("llama")` is the folder of a pico model of that family, written once a session. Do not write to it."""
    folders: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = make_pico(model_type, tmp_path_factory.mktemp(model_type))
        return folders[model_type]

    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel"))
