"""Any artifact, or any folder with a model, as one function from token ids to what the model says about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.benchmarks.quality import Floats, Ints
from compress.errors import CompressError

Task = Literal["causal", "masked", "classification", "embedding"]
Scorer = Callable[[Ints], Floats]
"""Ids (T,) of one sequence → logits (T, V) of a language model, (1, labels) of a classifier, (T, labels) of a token
classifier, or one embedding (1, H) of a bare encoder."""

_HEADS: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal"), ("LMHeadModel", "causal"), ("ForMaskedLM", "masked"),
    ("Classification", "classification"),
)  # fmt: skip


def task_of(folder: Path) -> Task:
    """What the model in `folder` was made for. A folder without config.json has a decoder (onnxruntime-genai's)."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        return "causal"
    architecture = (json.loads(config_file.read_text("utf-8")).get("architectures") or ["Model"])[0]
    return next((task for ending, task in _HEADS if architecture.endswith(ending)), "embedding")


def open_scorer(folder: Path, task: Task, *, threads: int) -> Scorer:
    """Load the model in `folder`, whatever its format. Raises CompressError where there is none."""
    if any(folder.glob("*.onnx")):
        return _onnx_scorer(folder, task, threads)
    if not (folder / "config.json").is_file():
        raise CompressError(str(folder), "has neither model.onnx nor config.json", "name a folder with a model")
    return _torch_scorer(folder, task)


def logits_of(model: Any) -> Scorer:
    """A torch model that is loaded already, with a head."""
    return lambda ids_T: np.atleast_2d(_forward(model, ids_T).logits[0].float().numpy())


def _torch_scorer(folder: Path, task: Task) -> Scorer:
    model = _load(folder)
    if task != "embedding":
        return logits_of(model)
    return lambda ids_T: pool(folder, _forward(model, ids_T)[0][0].float().numpy())


def _forward(model: Any, ids_T: Ints) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(np.asarray(ids_T, np.int64))[None])


def _load(folder: Path) -> Any:
    from compress.models.load import load_model

    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config.get("quantization_config", {}).get("quant_method") == "compress":
        from compress.quant.store import load_quantized_model

        return load_quantized_model(folder)
    return load_model(folder)


def _onnx_scorer(folder: Path, task: Task, threads: int) -> Scorer:
    from compress.runtime.session import OnnxModel

    model = OnnxModel(folder, threads=threads)

    def score(ids_T: Ints) -> Floats:
        ids_1T = np.asarray(ids_T, np.int64)[None]
        if task == "causal":
            logits_1TV, _ = model.forward(ids_1T)
            if logits_1TV.shape[1] != len(ids_T):
                fix = "give a build that computes all of them, for onnxruntime-genai's one without prune_lm_head"
                raise CompressError(str(folder), "computes the logits of the last token alone", fix)
            return np.asarray(logits_1TV[0])
        outputs = model.encode(ids_1T)
        if task != "embedding":
            return np.atleast_2d(outputs["logits"][0])
        if "sentence_embedding" in outputs:
            return np.atleast_2d(outputs["sentence_embedding"][0])
        return pool(folder, outputs["last_hidden_state"][0])

    return score


def pool(folder: Path, hidden_TH: Floats) -> Floats:
    """One embedding (1, H) from a sequence's hidden states, as sentence-transformers' `1_Pooling/config.json` says.

    Mean where it says nothing.
    """
    file = folder / "1_Pooling" / "config.json"
    pooling = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if pooling.get("pooling_mode_cls_token"):
        return hidden_TH[:1]
    pooled_1H: Floats = hidden_TH.mean(axis=0, keepdims=True)
    return pooled_1H
