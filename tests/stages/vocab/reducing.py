"""Running `reduce-vocab` on a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers_of_kinds import TEXTS

from compress.artifact import Artifact
from compress.data.text import TextData
from compress.stage import StageContext, Target
from compress.stages.vocab.stage import ReduceVocab


class Text:
    """Stands for a pipeline's text: these documents, whatever the split, packed as a pipeline packs them."""

    def __init__(self, texts: list[str] = TEXTS) -> None:
        self._texts = texts

    def texts(self, split: str) -> list[str]:
        return list(self._texts)

    def digest(self, split: str) -> str:
        return split

    blocks = TextData.blocks


def reduced(source: Path, out: Path, texts: list[str] = TEXTS, **options: Any) -> dict[str, float]:
    """Reduce the model in `source` into `out`, and return the figures of the result."""
    out.mkdir(parents=True)
    data: Any = Text(texts)
    context = StageContext(out, out, {"input": Artifact(source, "torch", "source", "key")}, data, 0, Target())
    return {**ReduceVocab.model_validate(options).run(context)["result"]}
