"""A YAML file as plain values, each with its line, so that a problem can be named by its place.

Reads YAML's core schema (`yes` is a word, `1e-4` a number, a date is text): what people mean, and what JSON can hold.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.errors import InvalidInput, Problem

MAX_BYTES = 100_000
MAX_DEPTH = 30
MAX_VALUES = 10_000

_GIVE_A_FILE = "give the path of a pipeline file"
_PLAIN_KEY = re.compile(r"[\w@,=/-]{1,60}")

Steps = tuple[str | int, ...]
"""How to get to a value: keys and indices from the top."""


@dataclass(frozen=True)
class Document:
    """The values of a file, what was wrong in it, and the line (from 1) of each value by its steps."""

    name: str
    text: str
    value: Any
    lines: dict[Steps, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def place(self, *steps: str | int) -> str:
        """`pipeline.yaml:7 stages[1].prune-layers.keep`; the line is that of the nearest value that is there."""
        written = next((steps[:n] for n in range(len(steps), 0, -1) if steps[:n] in self.lines), ())
        line = f":{self.lines[written]}" if written else ""
        return f"{self.name}{line} {_dotted(steps)}".rstrip()


def read_document(path: Path) -> Document:
    """Read a YAML file. Raises InvalidInput where it can't be read at all; lesser faults are in `problems`."""
    text = _text(path)
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, text, error) from error
    except yaml.reader.ReaderError as error:
        what = f"has a character that YAML does not allow ({error.character!r:.12})"
        raise InvalidInput(f"{path}:{_line_at(text, error.position)}", what, "delete it") from error
    if node is None:
        raise InvalidInput(str(path), "is empty", "`compress init MODEL` writes a file to begin with")
    walk = _Walk(str(path))
    value = walk.value(node, ())
    return Document(str(path), text, value, walk.lines, tuple(walk.problems))


def shown(value: object) -> str:
    """A value as a message shows it: short, on one line, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a very large number"
    return text if len(text) <= 60 else text[:57] + "…" + text[-1]


def _dotted(steps: Steps) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{_word(step)}" for step in steps).removeprefix(".")


def _word(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else shown(key)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        fix = f"did you mean {str(path.with_name(near[0]))!r}?" if near else "check the path"
        raise InvalidInput(str(path), "no such file", fix) from error
    except OSError as error:
        raise InvalidInput(str(path), f"can't be read ({error.strerror})", _GIVE_A_FILE) from error
    if len(raw) > MAX_BYTES:
        raise InvalidInput(str(path), f"is larger than {MAX_BYTES // 1000} kB", _GIVE_A_FILE)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"is not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise InvalidInput(f"{path}:{line}", what, "save it as UTF-8") from error


def _syntax_error(path: Path, text: str, error: yaml.MarkedYAMLError) -> InvalidInput:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines()
    source = lines[line - 1] if line <= len(lines) else ""
    if isinstance(error, _TooDeep):
        return InvalidInput(f"{path}:{line}:{column}", error.problem or "", "write it flatter")
    fix = "check indentation, colons, brackets and quotes there and on the line above"
    if re.search(r":\s*>=?\s*[\d.]", source):
        fix = 'a comparison that begins with > must be in quotes: ">= 0.95"'
    elif "\t" in source:
        fix = "indent with spaces: YAML does not allow tabs"
    elif "single document" in f"{error.context}":
        fix = "a pipeline file is one document: delete the `---` and what follows"
    what = f"is not valid YAML: {' '.join(filter(None, (error.context, error.problem)))}"
    return InvalidInput(f"{path}:{line}:{column}", " ".join(what.split()), fix)


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


class _TooDeep(yaml.MarkedYAMLError):
    """More nesting than any pipeline file has."""


class _Loader(yaml.SafeLoader):
    """YAML's core schema, and no deeper than MAX_DEPTH."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooDeep(problem=f"is nested more than {MAX_DEPTH} deep", problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_CORE = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _kind, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)


class _Walk:
    """Turns YAML's nodes into values, noting lines and faults."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Steps, int] = {}
        self.problems: list[Problem] = []
        self._num_values = 0

    def value(self, node: yaml.Node, steps: Steps) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(steps) > MAX_DEPTH:
            raise InvalidInput(self.name, "has too many values (aliases that repeat each other?)", "write it shorter")
        self.lines.setdefault(steps, node.start_mark.line + 1)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("map", "seq", "str", *_CORE):
            self._problem(node, steps, f"has the tag {shown(node.tag)}", "pipeline files use no tags")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, steps)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*steps, index)) for index, child in enumerate(node.value)]
        return self._scalar(node.value, kind, node, steps)

    def _mapping(self, node: yaml.MappingNode, steps: Steps) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, steps, "a key must be a word", "write `key: value`")
                continue
            key = key_node.value
            below = (*steps, key)
            if key in mapping:
                what = f"is given twice (first on line {self.lines[below]})"
                self._problem(key_node, below, what, "keep one")
                continue
            self.lines[below] = key_node.start_mark.line + 1
            mapping[key] = self.value(child, below)
        return mapping

    def _scalar(self, text: str, kind: str, node: yaml.Node, steps: Steps) -> Any:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self._problem(node, steps, "has half of a surrogate pair, which is no character", "delete it")
            return ""
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" if len(text) > 400:
                self._problem(node, steps, "has too many digits", "write a smaller number")
                return None
            case "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            case "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        return text

    def _problem(self, node: yaml.Node, steps: Steps, what: str, fix: str) -> None:
        where = f"{self.name}:{node.start_mark.line + 1} {_dotted(steps)}".rstrip()
        self.problems.append(Problem(where, what, fix))
