"""A pipeline that is killed three times in the midst of a stage: no unit twice, and what comes out the same to the bit.

`python -m compress.benchmarks.kills` does it at 25 random moments, with every stage.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from compress.benchmarks.kills import PIPELINES, contents, marks, units
from compress.registry import stage_names

STAGES = [
    {"prune-layers": {"drop": 2, "by": "leave-one-out", "tokens": 2048, "sequence_length": 64}},
    {"quantize": {"tokens": 256, "sequence_length": 64}},
    {"evaluate": {
        "tokens": 256, "sequence_length": 64, "recall": {"contexts": [128], "mqar_pairs": 2, "samples": 2},
    }},
]  # fmt: skip
KILLS = ("prune-layers round 0 batch 1", "quantize layer 0", "evaluate recall text 0")


@pytest.fixture(scope="module")
def runs(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the same run undisturbed and killed, and what was told of their processes."""
    folder = tmp_path_factory.mktemp("kills")
    file = folder / "pipeline.yaml"
    for index, split in enumerate(("train", "eval")):
        texts = [text for _, text in sorted(topics.items())[index:30:2]]
        (folder / f"{split}.txt").write_text("\n\n".join(texts), "utf-8")
    data = {"train": str(folder / "train.txt"), "eval": str(folder / "eval.txt"), "max_overlap": 1}
    head = {"name": "run", "model": str(pico("llama")), "data": data, "target": {"threads": 1}}
    file.write_text(json.dumps({**head, "stages": STAGES}), "utf-8")
    runs = {name: folder / name for name in ("undisturbed", "killed")}
    command = [sys.executable, Path(__file__).with_name("killed.py"), file, *runs.values(), *KILLS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["0", "-9", "-9", "-9", "0"]
    return {name: each / "run" for name, each in runs.items()}


def test_what_comes_out_is_what_an_undisturbed_run_gives(runs: dict[str, Path]) -> None:
    found, expected = contents(runs["killed"]), contents(runs["undisturbed"])
    assert found == expected
    files = {"scores.json", "scores.png", "model.safetensors", "errors.json", "evaluation.json"}
    assert files <= {name.rpartition("/")[2] for name in found}


def test_no_unit_is_done_twice(runs: dict[str, Path]) -> None:
    once, again = units(runs["undisturbed"] / "run.log"), units(runs["killed"] / "run.log")
    assert once == again
    assert set(again.values()) == {1}
    assert len(again) == 2 * 2 + (2 + 1) + (4 + 2)
    begun = [mark.stage for mark in marks(runs["killed"] / "run.log") if mark.text.endswith(f"] {mark.stage}")]
    assert begun == ["prune-layers", "prune-layers", "quantize", "quantize", "evaluate", "evaluate"]


def test_the_script_kills_every_stage_there_is() -> None:
    used = {name for stages in PIPELINES.values() for stage in stages for name in stage}
    assert used == {*stage_names()}
