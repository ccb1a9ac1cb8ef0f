"""What a conversion leaves beside its model: scores, losses, their plots, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.artifact import Metrics, write_json
from compress.mixers.spec import FULL, SLIDING
from compress.models.anatomy import shape_of
from compress.stage import StageContext
from compress.stages.convert.conversion import DISTILL, Conversion
from compress.stages.convert.layers import kinds
from compress.stages.convert.plot import plot_alignment, plot_scores
from compress.stages.convert.stage import ConvertAttention
from compress.train.record import write_record
from compress.train.resumable import EVENTS

_CACHE_TOKENS = 4096


def write_records(options: ConvertAttention, conversion: Conversion, context: StageContext) -> None:
    """Write `scores.json`, `alignment.json` and, of the end-to-end training, `history.json`, each with its plot."""
    choice, aligned, out = conversion.choice, conversion.aligned, context.out
    record = {
        "options": options.model_dump(mode="json", exclude_none=True), "seed": context.seed,
        "converted": list(choice.converted), "measure": choice.measure, "scores": dict(choice.scores),
        "num_tokens": choice.num_tokens,
    }  # fmt: skip
    write_json(out / "scores.json", record)
    if choice.scores:
        plot_scores(choice, out / "scores.png")
    if aligned is not None:
        alignment = {"losses": dict(aligned.losses), "train": list(aligned.log)}
        write_json(out / "alignment.json", alignment)
        plot_alignment(aligned, choice.converted, out / "alignment.png")
    if conversion.outcome is not None:
        outcome = conversion.outcome
        write_record(outcome.log, outcome.best_step, context.work / DISTILL / EVENTS, out)


def metrics(conversion: Conversion, context: StageContext) -> Metrics:
    """What a sequence keeps in memory before and after, and the losses of the trainings, in the order of the work."""
    aligned, outcome = conversion.aligned, conversion.outcome
    figures = _memory(conversion.model.config.to_dict())
    num_tokens = 0
    if aligned is not None:
        num_tokens += aligned.num_tokens
        losses = [aligned.losses[index] for index in conversion.choice.converted]
        figures["aligned_loss"] = sum(losses) / len(losses)
    if outcome is not None:
        num_tokens += outcome.num_tokens
        for name, evaluation in (("aligned_kl_to_teacher", outcome.first), ("kl_to_teacher", outcome.best)):
            if "eval_kl" in evaluation:
                figures[name], figures[f"{name}_se"] = evaluation["eval_kl"], evaluation["eval_kl_se"]
    return {"result": {**figures, "train_tokens": num_tokens}, "input": _memory(context.input.config)}


def _memory(config: Mapping[str, Any]) -> dict[str, float]:
    """The layers that attend with softmax, and MB (1e6 bytes, float32) that one sequence keeps: states, and a KV cache
    of so many tokens."""
    model = shape_of(config)
    found = kinds(model)
    if model.family.kind == "encoder":  # reads a text at once, and keeps nothing
        return {"num_softmax_layers": found.count(FULL), "state_mb": 0.0, f"kv_cache_mb@{_CACHE_TOKENS}": 0.0}
    seen = min(config.get("sliding_window") or _CACHE_TOKENS, _CACHE_TOKENS)
    layers = [model.of_layer(layer) for layer in range(model.num_hidden_layers)]
    tokens = {FULL: _CACHE_TOKENS, SLIDING: seen}
    cached = sum(own.num_key_value_heads * tokens.get(kind, 0) for own, kind in zip(layers, found, strict=True))
    states = [
        spec.state_bytes(own.num_attention_heads, own.num_key_value_heads, own.head_dim, own.v_head_dim)
        for own, spec in zip(layers, model.mixers, strict=False) if spec is not None
    ]  # fmt: skip
    return {
        "num_softmax_layers": found.count(FULL),
        "state_mb": sum(states) / 1e6,
        f"kv_cache_mb@{_CACHE_TOKENS}": 4 * 2 * model.head_dim * cached / 1e6,
    }
