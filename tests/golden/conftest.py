"""Models and records for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from golden.models import Workshop
from golden.write import record_file


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The models that records are of."""
    return Workshop(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def written() -> Callable[[str], dict[str, Any]]:
    """`written("quantize")`: its record."""
    return lambda stage: json.loads(record_file(stage).read_text("utf-8"))
