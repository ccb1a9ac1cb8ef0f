"""What every test of an export needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:  # torch only reads what NumPy mapped
            item.add_marker(pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Pico matrices are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
