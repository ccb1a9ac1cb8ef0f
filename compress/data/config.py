"""What text a pipeline reads, as its file names it. Imports neither torch nor numpy: `compress check` reads this.

A spec is a string or a mapping:
  python-docs                                    the interpreter's own reference, `pydoc_data.topics`
  texts/*.txt                                    a file, a folder or a glob; each file is one document
  corpus.jsonl                                   one JSON object a line; {path: corpus.jsonl, text_key: body}
  hf://org/name                                  a `datasets` name; {dataset: org/name, split: …, text_key: …}
  npm://@scope/package/1.2.3/data/*.txt          files of a published package, also pypi://package/version/path
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from compress.errors import InvalidInput, Problem
from compress.fetch.packages import SCHEMES, Package
from compress.registry import did_you_mean

PYTHON_DOCS = "python-docs"
HUB = "hf://"
SUFFIXES = (".txt", ".md", ".rst", ".text", ".jsonl")
"""What is taken for text where a folder is named."""

Split = Literal["train", "eval"]


class FileSpec(BaseModel):
    """Files on disk by path or glob, where the text of JSONL lines is under another key than `text`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1, description="file, folder or glob of text or .jsonl files")
    text_key: str = Field(default="text", description="the key of the text in each JSON line")


class DatasetSpec(BaseModel):
    """A data set that the `datasets` library knows by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$", description="name on the hub: org/name")
    config: str | None = Field(default=None, description="the data set's configuration, where it has several")
    split: str = Field(default="train", description="the data set's own split")
    revision: str | None = Field(default=None, description="commit, branch or tag")
    text_key: str = Field(default="text", description="the column that holds the text")
    max_documents: int | None = Field(default=None, ge=1, description="take only the first rows")


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "text"
    is_dataset = isinstance(value, DatasetSpec) or (isinstance(value, dict) and "dataset" in value)
    return "dataset" if is_dataset else "files"


Spec = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[FileSpec, Tag("files")]
    | Annotated[DatasetSpec, Tag("dataset")],
    Discriminator(_kind),
]


def _as_list(value: Any) -> Any:
    if value is None or isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, list) else (value,)


Specs = Annotated[
    tuple[Spec, ...],
    BeforeValidator(_as_list, json_schema_input_type=Spec | Annotated[list[Spec], Field(min_length=1)]),
    Field(min_length=1),
]


class DataConfig(BaseModel):
    """The `data` of a pipeline file. Without `eval`, a share of the documents of `train` is held out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Specs = Field(default=(PYTHON_DOCS,), description="text to train and calibrate on: a spec or a list of them")
    eval: Specs | None = Field(default=None, description="text to judge on; without it a share of `train` is held out")
    eval_share: float = Field(default=0.1, gt=0, lt=1, description="share of the text held out for it")
    max_overlap: float = Field(
        default=0.02, ge=0, le=1, description="share of the eval text that may also stand in the train text"
    )

    @property
    def holds_out(self) -> bool:
        """Whether eval text is held out of `train` and not named on its own."""
        return self.eval is None or self.eval == self.train

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the specs that can be told without fetching; `where` is the place within `data`."""
        for split in ("train", "eval"):
            specs: tuple[str | FileSpec | DatasetSpec, ...] = getattr(self, split) or ()
            for index, spec in enumerate(specs):
                where = split if len(specs) == 1 else f"{split}[{index}]"
                yield from _problems_of(spec, where)
        if self.eval is not None and not self.holds_out:
            for spec in set(self.train) & set(self.eval):
                fix = "name other text, or leave `eval` out to hold some out"
                yield Problem("eval", f"{spec} is also in train", fix)


def text_files(pattern: str) -> list[Path]:
    """The files that a path, a folder or a glob names, sorted: those with text suffixes where it is a folder."""
    path = Path(os.path.expanduser(pattern))  # os.path: a name too long or an unknown ~user is no file, and no OSError
    if os.path.isdir(path):
        return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if os.path.exists(path):
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def _problems_of(spec: str | FileSpec | DatasetSpec, where: str) -> Iterator[Problem]:
    if isinstance(spec, DatasetSpec) or spec == PYTHON_DOCS:
        return
    text = spec.path if isinstance(spec, FileSpec) else spec
    if text.startswith(HUB):
        try:
            DatasetSpec.model_validate({"dataset": text.removeprefix(HUB)})
        except ValueError:
            yield Problem(where, f"{text!r} is no data set name", "write hf://org/name")
    elif text.startswith(SCHEMES):
        try:
            Package.parse(text, where)
        except InvalidInput as error:
            yield from error.problems
    elif "://" in text:
        yield Problem(where, f"{text!r} has an unknown scheme", "use hf://, npm://, pypi:// or a path")
    else:
        yield from _file_problems(text, where)


def _file_problems(pattern: str, where: str) -> Iterator[Problem]:
    files = text_files(pattern)
    if not files:
        is_word = not any(mark in pattern for mark in "/\\*.")
        fix = did_you_mean(pattern, [PYTHON_DOCS]) if is_word else "paths are relative to the working directory"
        yield Problem(where, f"no file matches {pattern!r}", fix)
    for file in files:
        try:
            with file.open("rb") as stream:
                if not stream.read(1):
                    yield Problem(where, f"{file} is empty", "remove it or put text in it")
        except OSError as error:
            yield Problem(where, f"{file} can't be read ({error.strerror})", "check its permissions")
