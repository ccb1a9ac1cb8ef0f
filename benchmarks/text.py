"""One text that is only read: nothing is held out of it and it is compared with no other."""

from __future__ import annotations

from compress.data.config import DataConfig, Split
from compress.data.read import read_documents
from compress.data.text import TextData
from compress.errors import InvalidInput
from compress.fetch.packages import download


class OneText(TextData):
    """All documents of one spec, whatever the split. Raises InvalidInput for a spec that names nothing."""

    def __init__(self, spec: str) -> None:
        super().__init__(DataConfig(train=(spec,)))
        if problems := list(self.config.problems()):
            raise InvalidInput("--text", problems[0].what, problems[0].fix)

    def texts(self, split: Split) -> list[str]:
        """Every document."""
        return read_documents(self.config.train, "--text", download)
