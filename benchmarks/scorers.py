"""Any artifact, or any folder with a model, as one function from token ids to what the model says about them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.benchmarks.quality import Floats, Ints
from compress.errors import CompressError
from compress.models.anatomy import kind_of
from compress.models.folder import config_of
from compress.models.heads import Task, architecture_of, misfit, named_head
from compress.models.pooling import Pooling, read_pooling

if TYPE_CHECKING:
    from compress.runtime.session import OnnxModel

Rows = Ints | slice
_ALL = slice(None)
_ONNX_TOKENS = 1024
"""A graph reads so many tokens at once, or what its folder says, carrying its state: memory does not grow with T."""


class Scorer(Protocol):
    """Ids (T,) of one sequence → what the model says about them.

    That is logits (T, V) of a language model, (1, labels) of a classifier, (T, labels) of a token classifier, or one
    embedding (1, H) of a bare encoder. Of a language model, only the `rows` that are asked for are computed, in
    rising order, where the model allows it.
    """

    def __call__(self, ids_T: Ints, rows: Rows = _ALL) -> Floats: ...


def task_of(folder: Path) -> Task:
    """What the model in `folder` was made for. A folder without config.json has a decoder (onnxruntime-genai's).

    Raises CompressError for a head that is not judged here.
    """
    if not (folder / "config.json").is_file():
        return "causal"
    config = config_of(folder)
    if config is None:
        raise CompressError(str(folder), "has no readable config.json", "export or fetch it again")
    if problem := misfit(config, kind_of(config), ()):
        raise CompressError(str(folder), *problem)
    head = named_head(architecture_of(config))
    assert head is not None, "it would have been a misfit"
    return head.task


def open_scorer(folder: Path, task: Task, *, threads: int) -> Scorer:
    """Load the model in `folder`, whatever its format. Raises CompressError where there is none."""
    if any(folder.glob("*.onnx")):
        return _onnx_scorer(folder, task, threads)
    if not (folder / "config.json").is_file():
        raise CompressError(str(folder), "has neither model.onnx nor config.json", "name a folder with a model")
    return _torch_scorer(folder, task)


def logits_of(model: Any) -> Scorer:
    """A torch model that is loaded already, with a head."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def score(ids_T: Ints, rows: Rows = _ALL) -> Floats:
        if keeps:
            return np.asarray(_forward(model, ids_T, np.arange(len(ids_T))[rows]).logits[0].float())
        return np.atleast_2d(_forward(model, ids_T).logits[0].float().numpy())[rows]

    return score


def _torch_scorer(folder: Path, task: Task) -> Scorer:
    model = _load(folder)
    if task != "embedding":
        return logits_of(model)
    pooling = read_pooling(folder) or Pooling()
    return lambda ids_T, rows=_ALL: pooling.of(_forward(model, ids_T)[0].float().numpy())[rows]


def _forward(model: Any, ids_T: Ints, logits_of_R: Ints | None = None) -> Any:
    import torch

    ids_1T = torch.from_numpy(np.asarray(ids_T, np.int64))[None]
    with torch.inference_mode():
        return model(ids_1T) if logits_of_R is None else model(ids_1T, logits_to_keep=torch.from_numpy(logits_of_R))


def _load(folder: Path) -> Any:
    from compress.quant.load import load_any
    from compress.quant.schemes import ACCURACY_LEVEL

    return load_any(folder, accuracy_level=ACCURACY_LEVEL)


def _onnx_scorer(folder: Path, task: Task, threads: int) -> Scorer:
    from compress.runtime.session import OnnxModel

    model = OnnxModel(folder, threads=threads)
    if task == "causal" and not model.is_decoder and not (folder / "config.json").is_file():
        what = "has a graph without a cache, and no config.json that says what it is for"
        raise CompressError(str(folder), what, "put the config.json of the model that it was made from beside it")
    if task == "causal" and len(model.shapes.get("logits", [""])) not in (0, 3):  # 0: it does not say
        what = f"gives no logits of each token, but {', '.join(model.outputs[:3])}"
        raise CompressError(str(folder), what, "is its config.json that of the graph?")
    pooling = (read_pooling(folder) if task == "embedding" else None) or Pooling()

    def score(ids_T: Ints, rows: Rows = _ALL) -> Floats:
        if task == "causal":
            return _decoder_logits(model, ids_T, np.arange(len(ids_T))[rows])
        outputs = model.encode(np.asarray(ids_T, np.int64)[None])
        if task != "embedding":
            return np.atleast_2d(outputs["logits"][0])[rows]
        if "sentence_embedding" in outputs:
            return np.atleast_2d(outputs["sentence_embedding"][0])[rows]
        return pooling.of(outputs["last_hidden_state"])[rows]

    return score


def _decoder_logits(model: OnnxModel, ids_T: Ints, rows_R: Ints) -> Floats:
    """The logits (R, V) after the tokens `rows_R`, which rise, read as a prompt is."""
    chunk = model.chunk_size or _ONNX_TOKENS if model.is_decoder else len(ids_T)
    found, past = [], None
    for start in range(0, len(ids_T), chunk):
        ids_1N = np.asarray(ids_T[None, start : start + chunk], np.int64)
        stop = start + ids_1N.shape[1]
        from_end_R = rows_R[(rows_R >= start) & (rows_R < stop)] - stop
        num_logits = -int(from_end_R.min(initial=-1))
        logits_1LV, past = model.forward(ids_1N, np.ones((1, stop), np.int64), past, num_logits)
        if logits_1LV.shape[1] < num_logits:
            fix = "give a build that computes all of them, for onnxruntime-genai's one without prune_lm_head"
            raise CompressError(str(model.folder), "computes the logits of the last token alone", fix)
        found.append(logits_1LV[0, from_end_R])
    return np.concatenate(found)
