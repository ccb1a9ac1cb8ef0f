"""The dry run: the whole pipeline on a random twin of the model with a few layers, so that what can't work fails in
seconds and not after hours of training."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.errors import CompressError, InvalidInput
from compress.models.anatomy import ModelShape, shape_of
from compress.models.folder import config_of, tensor_names
from compress.models.sources import source_artifact
from compress.runner.execute import Setting, disk_explained, execute
from compress.runner.journal import Journal, blank_record
from compress.runner.plan import make_plan
from compress.runner.prepare import Prepared, before_any_stage
from compress.stage import Reporter
from compress.units import DONE

NUM_LAYERS = 4
"""Of the twin: enough that pruning has something to leave out twice."""
HEAD_DIM = 32
WINDOW = 8
"""Of the twin's sliding attention: shorter than the texts that its stages read."""
WIDTH_STEP = 32
"""Of the twin's widths: the block of the quantised formats, so that whole blocks stay whole."""
_log = logging.getLogger(__name__)
_log.addFilter(lambda record: record.levelno != logging.WARNING)  # a random model's figures are nothing to warn of
_log.addFilter(lambda record: record.msg != DONE)  # and it is done again each time


@before_any_stage()
def try_twin(prepared: Prepared) -> None:
    """Run every stage's `twin()` on a twin of the source, in a temporary folder.

    The twin keeps the source's heads, is shallow and narrow, has a few of its tokens, and reads the pipeline's own
    text. What the real tokenizer says against a stage is asked of it before. Raises InvalidInput for a source that
    can't be used, and naming the stage that failed; bugs keep their traceback.
    """
    with tempfile.TemporaryDirectory(prefix="compress-twin-") as temporary, disk_explained(Path(temporary)):
        run_dir = Path(temporary) / "run"
        run_dir.mkdir()
        origin = prepared.source_artifact
        for node in prepared.graph.nodes:
            node.stage.check_source(origin.path, prepared.data)
        twin = source_artifact(write_twin(origin.path, Path(temporary) / "twin"), "twin")
        nodes = tuple(replace(node, stage=node.stage.twin()) for node in prepared.graph.nodes)
        graph = replace(prepared.graph, nodes=nodes)  # the twin teaches, too, where another model does
        pipeline, data = prepared.pipeline, prepared.data
        plan = make_plan(
            graph, sources=dict.fromkeys(prepared.plan.sources, twin.key), data=data, seed=pipeline.seed,
            target=pipeline.target, run_dir=run_dir,
        )  # fmt: skip
        setting = Setting(lambda id: twin, data, pipeline.seed, pipeline.target, Reporter(_log), prefix="twin ")
        journal = Journal(run_dir, blank_record(pipeline, plan))
        try:
            execute(plan, setting, journal)
        except CompressError as error:
            failed = next((s.id for s in journal.record.stages if s.error), "")
            raise InvalidInput(
                failed, f"fails on a random twin of the model with {NUM_LAYERS} layers: {error.problem}",
                "nothing was computed yet; --no-twin leaves the dry run out",
            ) from error  # fmt: skip


def write_twin(origin: Path, out: Path) -> Path:
    """Write a model of the class and config of the one in `origin`, random and NUM_LAYERS deep, to `out`."""
    import torch
    import transformers

    from compress.models.dtypes import half_types, round_to
    from compress.models.load import auto_class, left_out, save_model
    from compress.models.pretrained import new_model, read_folder
    from compress.vocab.small import small_vocabulary

    out.mkdir()
    config_dict = twin_config(config_of(origin) or {})
    shape = shape_of(config_dict)
    if small := small_vocabulary(origin, shape.vocab_size):
        config_dict = small.config(config_dict) | {shape.family.key("vocab_size"): small.vocab_size}
    (out / "config.json").write_text(json.dumps(config_dict))
    auto = auto_class(config_dict)
    config = read_folder(transformers.AutoConfig, out, "is config.json complete?")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(auto, config, dtype=torch.float32, **left_out(config_dict, tensor_names(origin)))
    round_to(model, half_types(origin))  # so that what is cut out of it is stored as of the model itself
    save_model(model, origin, out)
    if small:
        small.rewrite(out)
    return out


def twin_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its layers, and every list that has one entry a layer, cut down to NUM_LAYERS, and narrower.

    Heads keep their number and shrink to HEAD_DIM; the other widths shrink alike, to multiples of WIDTH_STEP. Of layers
    of several kinds, some of each stay.
    """
    shape = shape_of(config)
    key, deep = shape.family.key, shape.num_hidden_layers
    kept = _some_layers(shape)
    cut = {
        name: [value[index] for index in kept]
        for name, value in config.items()
        if isinstance(value, list) and len(value) == deep
    }
    if shape.layer_types:
        cut["layer_types"] = [shape.layer_types[index] for index in kept]
    twin = {**config, **cut, key("num_hidden_layers"): len(kept)}
    if config.get("sliding_window"):
        twin["sliding_window"] = min(config["sliding_window"], WINDOW)
    if shape.mixers:
        twin["mixers"] = [mixer and {**mixer, "window": min(mixer.get("window", 0), WINDOW)} for mixer in cut["mixers"]]
    if shape.head_dim > HEAD_DIM:
        for name in ("hidden_size", "intermediate_size"):
            width = getattr(shape, name) * HEAD_DIM / shape.head_dim
            twin[key(name)] = math.ceil(width / WIDTH_STEP) * WIDTH_STEP
        if shape.hidden_size == shape.num_attention_heads * shape.head_dim:
            twin[key("hidden_size")] = shape.num_attention_heads * HEAD_DIM
        if "head_dim" in config or not shape.family.tied_heads:
            twin["head_dim"] = HEAD_DIM
    return twin


def _some_layers(shape: ModelShape) -> list[int]:
    """NUM_LAYERS layers, or more where there are more kinds of them: the first of each kind, and the next ones."""
    layers = range(shape.num_hidden_layers)
    kinds = {(*shape.mixers[index : index + 1], *shape.layer_types[index : index + 1]): index for index in layers[::-1]}
    order = dict.fromkeys([*kinds.values(), *layers])
    return sorted(list(order)[: max(NUM_LAYERS, len(kinds))])
