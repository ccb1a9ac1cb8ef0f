"""The commented pipeline file that `compress init` writes: the whole road, with options that fit the model."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

from compress.models.anatomy import ModelShape

_TEMPLATE = """\
# A pipeline for `compress run {file}`. Check it first: `compress check {file}`.
# `compress stages` lists what can be done, `compress stages NAME` the options; `compress schema` is for editors.
name: {name}                  # results go to runs/{name}/
model: {model}
data:
  train: python-docs            # the interpreter's own documentation; or a file, a glob, hf://org/name, npm://…
  # eval: texts/*.txt           # without it a share of `train` is held out. Judge on text like your own
target: {{threads: 2}}            # where latency is measured
seed: 0

stages:
{prune}{distill}  - export-onnx: {{format: int4}}   # fp32, int8 or int4: the folder to deploy
{evaluate}  - latency: {{prompts: {prompts}}}   # against the source in fp32 and in int4

# What must hold of the result. A run that misses one ends with exit status 3, keeps everything and says by how much.
require:
{quality}  size_mb: "<= 0.2x source"
{tpot}"""

_PRUNE = """\
  - prune-layers: {{drop: {drop}, by: block-influence}}   # leave out the layers that change the text's course least
{evaluate}"""
_DISTILL = """\
  - distill: {{teacher: source, tokens: 100000, sequence_length: {length}}}   # more tokens bring it closer
  - evaluate
"""
_EVALUATE = "  - evaluate                      # {what}\n"
_QUALITY = {
    "causal": ("perplexity", "<= 1.5x source"), "masked": ("perplexity", "<= 1.5x source"),
    "classification": ("top1_agreement", ">= 0.9"), "embedding": ("cosine", ">= 0.9"),
}  # fmt: skip
"""What must hold by default of a model of each task."""


def starter(model: str, file: str, shape: ModelShape | None) -> str:
    """The text of a pipeline file for that model; `shape` is None where its config.json is not at hand."""
    positions = shape.max_position_embeddings if shape else 2048
    drop = 2 if shape is None else min(2, shape.num_hidden_layers // 4)
    prompts = [length for length in (128, 1024) if length + 128 <= positions] or [max(1, positions // 2)]
    decoder = shape is None or shape.family.kind == "decoder"
    judged = shape is None or not shape.unjudged  # a head that no stage judges is pruned, exported and timed
    figure, limit = _QUALITY[shape.head.task if shape and shape.head else "causal"]
    deployed = "how far what is deployed is from the source"
    return _TEMPLATE.format(
        file=file,
        name=run_name(model),
        model=json.dumps(model, ensure_ascii=False),
        prune=_PRUNE.format(drop=drop, evaluate=_evaluation("what the pruning cost", judged)) if drop else "",
        distill=_DISTILL.format(length=min(256, positions)) if judged else "",
        evaluate=_evaluation(deployed, judged),
        quality=f'  {figure}: "{limit}"\n' if judged else "",
        prompts=prompts,
        tpot=f'  tpot_ms@{prompts[0]}: "<= 0.5x source"\n' if decoder else "",
    )


def _evaluation(what: str, judged: bool) -> str:
    return _EVALUATE.format(what=what) if judged else ""


def run_name(model: str) -> str:
    """A run's name from a model's: the last part, without what a name can't hold."""
    *_, last = PurePosixPath(model.split("@")[0]).parts or ("model",)
    last = last.removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:60].lower() or "model"
