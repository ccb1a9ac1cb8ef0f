"""`prune-layers`: leave out the layers that the model misses least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.artifact import Format, Metrics, write_json
from compress.errors import Problem
from compress.models.anatomy import ModelShape
from compress.models.layer_choice import Layers, count
from compress.options import counted
from compress.stage import Given, Stage, StageContext, unjudged

SCALED = Problem(
    "", "scale_attn_by_inverse_layer_idx: the layers after a dropped one would change their scale",
    "this model's layers can't be dropped",
)  # fmt: skip
"""Why no layer of such a GPT-2 can go."""

if TYPE_CHECKING:
    from compress.models.parts import Parts
    from compress.stages.prune.scores import Choice

By = Literal["block-influence", "angular", "leave-one-out", "uniform", "random"]


class PruneLayers(Stage):
    """Drops whole layers. The result is an ordinary, smaller model of the same class."""

    name: ClassVar[str] = "prune-layers"
    version: ClassVar[int] = 4
    summary: ClassVar[str] = "leave out the layers that the model misses least"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    plots: ClassVar[Mapping[str, str]] = {"scores.png": "what leaving out each layer costs; the cheapest are dropped"}
    example: ClassVar[Mapping[str, Any]] = {"drop": 1}

    keep: Layers | None = Field(None, description="layers to keep: a number, a share (0.8) or a list of indices from 0")
    drop: Layers | None = Field(None, description="layers to drop, in place of keep: a number, a share or a list")
    by: By = Field(
        "block-influence",
        description="block-influence: how little a layer turns the residual stream; angular: the same of a run of "
        "neighbouring layers; leave-one-out: KL to the full model, greedily, dearer and better; uniform: evenly "
        "spaced; random: by the seed",
    )
    tokens: int | None = Field(
        None, ge=1, description="training tokens to score on; 16384 where left out, and 2048 for leave-one-out"
    )
    sequence_length: int = Field(256, ge=2, description="tokens of each text block that is scored on")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give either keep or drop")
        if "by" in self.model_fields_set and isinstance(self._asked[1], tuple):
            raise ValueError(f"by has no say where {self._asked[0]} lists the layers: remove by, or give a number")
        return self

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """The text that layers are scored on, where they are."""
        return frozenset({"train"}) if self._scores else frozenset()

    def uses_seed(self) -> bool:
        return self.by == "random" and not isinstance(self._asked[1], tuple)

    def settled(self, given: Given) -> Mapping[str, Any]:
        """Which layers stay, or how many and how they are chosen."""
        option, asked = self._asked
        total = given.shape.num_hidden_layers
        keep: int | list[int] = self._num_kept(total)
        if isinstance(asked, tuple):
            keep = sorted(set(asked) if option == "keep" else set(range(total)) - set(asked))
        meant: dict[str, Any] = {"keep": keep, "drop": None, "by": None if isinstance(asked, tuple) else self.by}
        text = {"tokens": self._budget} if self._scores else {"tokens": None, "sequence_length": None}
        return counted(self, meant | text)

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether the model has these layers, and takes text blocks of this length."""
        if model.scales_by_layer:
            yield SCALED
        option, asked = self._asked
        total, kept = model.num_hidden_layers, self._num_kept(model.num_hidden_layers)
        if isinstance(asked, tuple) and (len(set(asked)) < len(asked) or max(asked) >= total):
            what = f"{list(asked)} has an index twice or beyond the model's {total} layers"
            yield Problem(option, what, f"list different indices from 0 to {total - 1}")
        elif not 0 < kept < total:
            share = f", or a share from {1 / total:.2f} to {1 - 1 / total:.2f}"
            fix = f"choose 1 to {total - 1}{share}" if total > 1 else "a model of one layer can't be pruned by layers"
            yield Problem(option, f"{asked} of {total} layers leaves {kept} and drops {total - kept}", fix)
        if self.by == "leave-one-out" and self._scores:
            yield from unjudged("by", model)
        if self.sequence_length > model.max_position_embeddings:
            what = f"{self.sequence_length} is beyond the model's {model.max_position_embeddings} positions"
            yield Problem("sequence_length", what, f"at most {model.max_position_embeddings}")
        if self._budget < self.sequence_length:
            what = f"{self._budget} tokens do not fill one block of sequence_length {self.sequence_length}"
            yield Problem("tokens", what, f"at least {self.sequence_length}")

    def shape(self, model: ModelShape) -> ModelShape:
        """The same model with fewer layers: where scores will choose them, every so many-th."""
        option, asked = self._asked
        total, kept = model.num_hidden_layers, self._num_kept(model.num_hidden_layers)
        if not isinstance(asked, tuple):
            evenly = model.of_layers([index * total // kept for index in range(kept)])
            return replace(evenly, layers_guessed=bool(model.mixers))
        return model.of_layers([index for index in range(total) if (index in asked) == (option == "keep")])

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Every parameter of the smaller model, in the type that it had."""
        return model.weight_bytes

    def twin(self) -> Self:
        """Keeps one layer, scored on four short blocks."""
        return self.model_copy(update={"keep": 1, "drop": None, "tokens": 64, "sequence_length": 16})

    def run(self, context: StageContext) -> Metrics:
        """Score the layers, drop some, and write the smaller model with `scores.json` and `scores.png`."""
        from compress.models.load import load_model, save_model
        from compress.models.parts import Parts
        from compress.stages.prune.plot import plot_scores
        from compress.stages.prune.surgery import drop_layers

        model = load_model(context.input.path)
        parts = Parts(model)
        total = len(parts.layers)
        choice = self._choose(parts, context)
        context.reporter.log.info("prune-layers: dropping layers %s", ", ".join(map(str, choice.dropped)) or "none")
        drop_layers(model, choice.dropped)
        save_model(model, context.input.path, context.out)
        options = self.model_dump(mode="json", exclude_none=True)
        drawn = {"seed": context.seed} if self.uses_seed() else {}
        write_json(context.out / "scores.json", {"options": options, **drawn, **asdict(choice)})
        if choice.rounds:
            plot_scores(choice, total, context.out / "scores.png")
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"result": {"parameters": num_parameters, "num_hidden_layers": total - len(choice.dropped)}}

    @property
    def _asked(self) -> tuple[str, int | float | tuple[int, ...]]:
        """The option that was given, keep or drop, and its value."""
        if self.keep is not None:
            return "keep", self.keep
        assert self.drop is not None
        return "drop", self.drop

    @property
    def _scores(self) -> bool:
        """Whether what layers do on text decides."""
        return not isinstance(self._asked[1], tuple) and self.by not in ("uniform", "random")

    @property
    def _budget(self) -> int:
        return self.tokens or (2048 if self.by == "leave-one-out" else 16384)

    def _num_kept(self, total: int) -> int:
        option, asked = self._asked
        return count(asked, total) if option == "keep" else total - count(asked, total)

    def _choose(self, parts: Parts, context: StageContext) -> Choice:
        from compress.stages.prune import scores
        from compress.units import Units

        option, asked = self._asked
        total = len(parts.layers)
        num_dropped = total - self._num_kept(total)
        if isinstance(asked, tuple):
            return scores.Choice(sorted(set(range(total)) - set(asked) if option == "keep" else asked))
        if self.by == "uniform":
            return scores.Choice(scores.uniform(total, num_dropped))
        if self.by == "random":
            return scores.Choice(scores.at_random(total, num_dropped, context.seed))
        batches = scores.batches_of(scores.blocks_to_score(context, self.sequence_length, self._budget))
        rounds = num_dropped if self.by == "leave-one-out" else 1
        units = Units("prune-layers", context.work / "scores", log=context.reporter.log)
        with context.reporter.progress("scoring layers", rounds * len(batches)) as advance:
            return scores.choose(self.by, parts, batches, num_dropped, advance, units)
