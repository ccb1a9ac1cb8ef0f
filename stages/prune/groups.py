"""`prune-groups`: narrower layers and a narrower residual stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.artifact import Format, Metrics, write_json
from compress.errors import Problem, StageFailed
from compress.models.anatomy import ModelShape
from compress.options import counted
from compress.runtime.width_step import known_step, measured_step
from compress.stage import Given, Stage, StageContext
from compress.stages.prune import widths
from compress.stages.prune.widths import Kind, Widths

if TYPE_CHECKING:
    from compress.models.axes import Place
    from compress.models.narrow import Kept
    from compress.models.parts import Parts
    from compress.stages.prune.importance import Importance

By = Literal["activation", "taylor", "magnitude", "random"]
Number = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]


class PruneGroups(Stage):
    """Cuts widths: heads, neurons, channels. The result is an ordinary, smaller model where one width fits all layers.

    What goes together (the rows and columns of all tensors that belong to a head, a neuron or a channel) is derived
    from the family's anatomy; where a tensor is not explained by it, nothing is cut.
    """

    name: ClassVar[str] = "prune-groups"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "cut heads, neurons and channels that the model needs least"
    accepts: ClassVar[frozenset[Format]] = frozenset({"torch"})
    returns: ClassVar[Format] = "torch"
    plots: ClassVar[Mapping[str, str]] = {"groups.png": "share of the importance that stays in each layer"}
    example: ClassVar[Mapping[str, Any]] = {"keep": {"intermediate": 0.5}}

    keep: dict[Kind, Number | Share] | None = Field(
        None, min_length=1,
        description="what stays in each layer, a number or a share (0.75), of: attention-heads (query heads, as many "
        "of each key/value head), kv-groups (a key/value head with its query heads), intermediate (neurons of the "
        "MLP), hidden (channels of the residual stream), ssm-heads and ssm-channels (query heads and value channels "
        "of layers that convert-attention made)",
    )  # fmt: skip
    cut: tuple[Kind, ...] | None = Field(
        None, min_length=1, description="what to cut, all by one share, until a budget is met; in place of keep"
    )
    params: Number | Share | None = Field(None, description="budget: at most so many parameters, or a share of them")
    size_mb: float | None = Field(None, gt=0, description="budget: at most so many megabytes of weights in float32")
    by: By = Field(
        "activation",
        description="activation: √Σ (mean |a|)² of what a part gives (Minitron); taylor: |gradient × weight| of the "
        "cross-entropy with the text (decoders); magnitude: of the weights; random: by the seed",
    )
    allocate: Literal["uniform", "global"] = Field(
        "uniform",
        description="uniform: one width for all layers; global: the same in total, each layer as wide as its scores "
        "say, which loads through our own class",
    )
    multiple_of: int | None = Field(
        None, ge=1,
        description="shares of intermediate and hidden are rounded to a multiple of it, where that fits; null: the "
        "step at which matrix products get faster on this machine, measured once and kept in the cache",
    )  # fmt: skip
    tokens: int = Field(32_768, ge=1, description="training tokens to score on")
    sequence_length: int = Field(256, ge=2, description="tokens of each text block that is scored on")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        budgets = [name for name in ("params", "size_mb") if getattr(self, name) is not None]
        if self.keep is not None and (self.cut or budgets):
            raise ValueError(f"keep says what stays: remove {'cut' if self.cut else budgets[0]}, or keep")
        if self.keep is None and (self.cut is None or len(budgets) != 1):
            raise ValueError("give keep, or cut with one budget: params or size_mb")
        return self

    def reads(self) -> frozenset[Literal["train", "eval"]]:
        """The text that is scored on, where it is."""
        return frozenset({"train"}) if self._scores else frozenset()

    def uses_seed(self) -> bool:
        return self.by == "random"

    def settled(self, given: Given) -> Mapping[str, Any]:
        """What shares of this model come to; of a budget, the budget."""
        text: dict[str, Any] = {} if self._scores else {"tokens": None, "sequence_length": None}
        step = {"multiple_of": self._step}
        if self.keep is None:
            return counted(self, {**text, **step, "cut": sorted(self.cut or ())})
        told = step if self.allocate == "global" else {"multiple_of": None}
        return counted(self, {**text, **told, "keep": dict(sorted(self._numbers(given.shape).items()))})

    def check(self, model: ModelShape) -> Iterator[Problem]:
        """Whether the model can have these widths, and takes text blocks of this length."""
        if self.keep is not None:
            yield from widths.problems(self.keep, model, self._step, self.multiple_of is not None)
        else:
            yield from self._budget_problems(model)
        if self.by == "taylor" and model.family.kind == "encoder":
            yield Problem("by", "taylor needs a loss, and an encoder has none without labels", "use activation")
        if self.sequence_length > model.max_position_embeddings:
            what = f"{self.sequence_length} is beyond the model's {model.max_position_embeddings} positions"
            yield Problem("sequence_length", what, f"at most {model.max_position_embeddings}")
        if self._scores and self.tokens < self.sequence_length:
            what = f"{self.tokens} tokens do not fill one block of sequence_length {self.sequence_length}"
            yield Problem("tokens", what, f"at least {self.sequence_length}")

    def measure_first(self, log: logging.Logger) -> None:
        """The step of a width, where `multiple_of` leaves that to the machine and a number is rounded to it."""
        rounds = self.keep is None or self.allocate == "global" or any(isinstance(n, float) for n in self.keep.values())
        if self.multiple_of is None and rounds:
            log.info("%s: on this machine widths get faster in steps of %d", self.name, measured_step())

    def shape(self, model: ModelShape) -> ModelShape:
        """The same model with its new widths; with allocate: global, as if all layers had the same."""
        return widths.narrower(model, self._uniform(model, self._numbers(model)))

    def weight_bytes(self, model: ModelShape, before: float) -> float:
        """Every parameter of the smaller model, in the type that it had."""
        return model.weight_bytes

    def twin(self) -> Self:
        """Shares in place of the numbers that a narrow twin has not, scored on four short blocks.

        Heads keep their number in a twin. A budget is for the whole model, of which a twin has a few layers and tokens:
        half of each kind goes instead.
        """
        changes: dict[str, Any] = {"tokens": 64, "sequence_length": 16, "multiple_of": 1}
        if self.keep is None:
            keep = dict.fromkeys(self.cut or (), 0.5)
            return self.model_copy(update={**changes, "keep": keep, "cut": None, "params": None, "size_mb": None})
        shares = {kind: 0.5 for kind in ("intermediate", "hidden", "ssm-channels") if kind in self.keep}
        return self.model_copy(update={**changes, "keep": {**self.keep, **shares}})

    def run(self, context: StageContext) -> Metrics:
        """Score, choose, cut, and write the smaller model with `groups.json` and `groups.png`."""
        from compress.models.load import load_model, save_model
        from compress.models.narrow import explained, narrow
        from compress.models.parts import Parts
        from compress.stages.prune.narrowing import note_origins, rebuilt, saved_modules
        from compress.stages.prune.selection import choose

        model = load_model(context.input.path)
        parts = Parts(model)
        placed = explained(parts, self.name)
        importance = self._importance(parts, placed, context)
        layers = self._widths(parts, placed, importance)
        kept = choose(importance, parts.shape, layers)
        smaller = rebuilt(parts, narrow(parts, placed, kept), layers)
        note_origins(smaller, parts, kept)
        save_model(smaller, context.input.path, context.out)
        saved_modules(context.input.path, context.out, kept.hidden)
        self._record(importance, parts, kept, context)
        figures = {"parameters": sum(parameter.numel() for parameter in smaller.parameters())}
        return {"result": {**figures, "hidden_size": layers[0].hidden, **_means(layers)}}

    @property
    def _scores(self) -> bool:
        """Whether what is seen on text decides."""
        return self.by in ("activation", "taylor")

    @property
    def _step(self) -> int:
        return self.multiple_of or known_step()

    def _uniform(self, model: ModelShape, kept: Mapping[Kind, int]) -> list[Widths]:
        return [widths.layer_widths(kept, model, layer) for layer in range(model.num_hidden_layers)]

    def _numbers(self, model: ModelShape) -> dict[Kind, int]:
        """What stays of each kind; of a budget what the estimate of `ModelShape` says."""
        if self.keep is not None:
            return widths.counts(self.keep, model, self._step)
        return self._within(model, partial(self._estimated, model))[0]

    def _estimated(self, model: ModelShape, kept: Mapping[Kind, int]) -> int:
        return widths.narrower(model, self._uniform(model, kept)).num_parameters

    def _within(self, model: ModelShape, cost: widths.Cost) -> tuple[dict[Kind, int], float]:
        """The widest numbers whose `cost` in parameters is within the budget, and that cost."""
        assert self.cut is not None
        return widths.within(self.cut, model, self._step, self._budget(cost({})), cost)

    def _budget(self, total: int) -> float:
        """The parameters that the budget admits, of a model of `total`."""
        if self.size_mb is not None:
            return self.size_mb * 1e6 / 4
        assert self.params is not None
        return self.params * total if isinstance(self.params, float) else self.params

    def _budget_problems(self, model: ModelShape) -> Iterator[Problem]:
        """A budget that nothing meets, by the estimate of the parameters."""
        assert self.cut is not None
        where = "params" if self.params is not None else "size_mb"
        yield from widths.problems(dict.fromkeys(self.cut, 1.0), model, self._step, False)
        cost = partial(self._estimated, model)
        (kept, found), budget = self._within(model, cost), self._budget(cost({}))
        if found > budget:
            said = f"{found / 1e6:.1f}M parameters ({4 * found / 1e6:.0f} MB)"
            least = ", ".join(f"{kind} {number}" for kind, number in kept.items())
            yield Problem(where, f"no widths of {', '.join(self.cut)} meet it", f"the closest is {said}: {least}")

    def _widths(self, parts: Parts, placed: Mapping[str, Place], importance: Importance) -> list[Widths]:
        """The widths of each layer. Raises StageFailed where no widths meet the budget."""
        from compress.stages.prune.narrowing import num_parameters
        from compress.stages.prune.selection import allocated

        shape = parts.shape
        if self.keep is not None:
            kept = self._numbers(shape)
        else:
            def cost(kept: Mapping[Kind, int]) -> int:
                return num_parameters(parts, placed, self._uniform(shape, kept))

            kept, found = self._within(shape, cost)
            if found > self._budget(cost({})):
                raise StageFailed(self.name, "no widths meet the budget", f"the closest has {found:.0f} parameters")
        if self.allocate == "global":
            return allocated(importance, shape, kept, self._step)
        return self._uniform(shape, kept)

    def _importance(self, parts: Parts, placed: Mapping[str, Place], context: StageContext) -> Importance:
        from compress.stages.prune import importance
        from compress.stages.prune.scores import batches_of, blocks_to_score
        from compress.units import Units

        if self.by == "random":
            return importance.at_random(parts, context.seed)
        if self.by == "magnitude":
            return importance.magnitude(parts, placed)
        if self.by == "taylor" and parts.lm_head is None:
            what = "taylor needs the loss of the next token, and this model does not predict it"
            raise StageFailed(f"{self.name}.by", what, "use activation")
        batches = batches_of(blocks_to_score(context, self.sequence_length, self.tokens))
        units = Units(self.name, context.work / "importance", log=context.reporter.log)
        with context.reporter.progress("scoring groups", len(batches)) as advance:
            if self.by == "taylor":
                return importance.taylor(parts, placed, batches, advance, units)
            return importance.activation(parts, batches, advance, units)

    def _record(self, importance: Importance, parts: Parts, kept: Kept, context: StageContext) -> None:
        """Write what stayed and why: `groups.json` and `groups.png`."""
        from compress.stages.prune.plot import plot_shares
        from compress.stages.prune.selection import shares

        held = shares(importance, kept)
        options = self.model_dump(mode="json", exclude_none=True)
        drawn = {"seed": context.seed} if self.uses_seed() else {}
        stay = {"hidden": kept.hidden, "layers": kept.layers}
        record = {"options": options, **drawn, "measure": importance.measure, "num_tokens": importance.num_tokens}
        write_json(context.out / "groups.json", {**record, "shares": held, "kept": stay})
        plot_shares(held, importance.measure, context.out / "groups.png")


def _means(layers: Sequence[Widths]) -> dict[str, float]:
    """The widths of the layers, in the words of `config.json`: the mean where they differ."""
    named = {"intermediate_size": "intermediate", "num_attention_heads": "heads", "num_key_value_heads": "groups"}
    return {name: sum(getattr(w, field) for w in layers) / len(layers) for name, field in named.items()}
