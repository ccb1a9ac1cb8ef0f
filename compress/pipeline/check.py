"""Everything that can be told of a pipeline file before anything is fetched or computed. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.data.text import check_special_ids
from compress.errors import CompressError, InvalidInput, Problem
from compress.models.anatomy import ModelShape, shape_of
from compress.models.folder import NO_MASK_TOKEN, lacks_mask_token
from compress.models.sources import parse_source
from compress.pipeline.file import Draft, Pipeline, in_order, read_draft
from compress.pipeline.graph import Graph, build_graph
from compress.pipeline.require import measured_early, unproven


@dataclass(frozen=True)
class Checked:
    """What was found. Notes are worth a word and no faults: what is unchecked, what may not be meant.

    draft: what was read of the file; None where it can't be read at all.
    """

    path: Path
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...] = ()
    graph: Graph = field(default_factory=lambda: Graph(()))
    draft: Draft | None = None

    def to_json(self) -> dict[str, Any]:
        """The same for other programs."""
        return {
            "file": str(self.path),
            "valid": not self.problems,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [asdict(note) for note in self.notes],
            "stages": [
                {"id": node.id, "stage": node.stage.name, "inputs": dict(node.inputs), "hidden": node.hidden}
                for node in self.graph.nodes
            ],
        }


def check_file(path: Path) -> Checked:
    """Check a pipeline file: the file, its data and model as far as they are at hand, and how its stages fit."""
    try:
        draft = read_draft(path)
    except InvalidInput as error:
        return Checked(path, error.problems)
    problems, notes = [*draft.problems, *_data_problems(draft)], []
    shape: ModelShape | None = None
    folder: Path | None = None
    if draft.model is not None:
        place = draft.document.place("model")
        try:
            source = parse_source(draft.model, place)
            config = source.config()
            shape = None if config is None else shape_of(config, place)
            if shape is not None:
                folder = source.fetch()  # at hand already: what its folder lacks is told now
                _check_ids(folder, shape.vocab_size)
        except InvalidInput as error:
            problems += error.problems
        except CompressError as error:
            problems.append(replace(error.problem, where=place))
        else:
            if config is None:
                notes.append(Problem(place, "unchecked until fetched: whether the options fit the model"))
    graph, unfit = build_graph(draft.entries, shape)
    problems += unfit
    if folder is not None and lacks_mask_token(folder):
        problems += _untaught(graph)
    if not draft.problems:  # of a broken file, only what lies before the first fault can be judged
        problems += unproven(graph, draft.require)
        notes += measured_early(graph, draft.require)
    return Checked(path, in_order(problems), in_order(notes), graph, draft)


def valid_pipeline(path: Path) -> Pipeline:
    """The pipeline in `path`, for a run. Raises InvalidInput with everything that `check_file` finds.

    Reads it once: it may be a pipe.
    """
    checked = check_file(path)
    if checked.problems or checked.draft is None:
        raise InvalidInput.of(checked.problems)
    return checked.draft.pipeline()


def _check_ids(folder: Path, vocab_size: int) -> None:
    try:
        check_special_ids(folder, vocab_size)
    except CompressError as error:
        named = error.problem
        raise CompressError(str(folder), f"its {named.where} {named.what}", named.fix) from error


def _untaught(graph: Graph) -> Iterator[Problem]:
    """What is wrong with the stages that have a masked language model read hidden tokens: there is no mask token."""
    what, fix = NO_MASK_TOKEN
    for node in graph.nodes:
        if node.shape and node.shape.fills_masks and node.stage.hides_tokens():
            yield Problem(node.place, f"the model's tokenizer {what}", fix)


def _data_problems(draft: Draft) -> Iterator[Problem]:
    for problem in draft.data.problems() if draft.data is not None else ():
        option, _, rest = problem.where.partition("[")
        yield Problem(draft.document.place("data", option) + f"[{rest}" * bool(rest), problem.what, problem.fix)
