"""Which candidate is chosen, and what is warned of: on figures made by hand."""

from __future__ import annotations

import pytest

from compress.pipeline.require import RESULT
from compress.stages.choose.budget import Budget
from compress.stages.choose.choice import Candidate, choose, judge, rounds_ms

FP32 = {"prefill": [100.0, 110.0, 90.0], "decode": [30.0, 31.0, 29.0]}
INT8 = {"prefill": [50.0, 55.0, 45.0], "decode": [14.0, 15.0, 13.0]}
INT4 = {"prefill": [120.0, 125.0, 119.0], "decode": [10.0, 11.0, 9.0]}
INT2 = {"prefill": [10.0, 10.0, 10.0], "decode": [1.0, 1.0, 1.0]}
QUALITY = {"fp32": 20.0, "int8": 20.4, "int4": 21.0, "int2": 90.0}


def budget(**limits: float) -> Budget:
    return Budget.model_validate(limits)


def candidate(name: str, size_mb: float, rounds: dict[str, list[float]], within: Budget, **limits: float) -> Candidate:
    quality = {RESULT: {"perplexity": QUALITY.get(name, 20.0)}, "source": {"perplexity": 20.0}}
    verdicts = judge(within.requirements("source", limits.get("max_size_mb")), quality, size_mb)
    return Candidate(name, size_mb, quality[RESULT], verdicts, rounds)


def all_of(within: Budget, **limits: float) -> list[Candidate]:
    table = (("fp32", 540.0, FP32), ("int8", 170.0, INT8), ("int4", 86.0, INT4), ("int2", 50.0, INT2))
    return [candidate(name, size_mb, rounds, within, **limits) for name, size_mb, rounds in table]


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        ({"prefill": 1.0}, "int8"), ({"decode": 1.0}, "int4"), ({"prefill": 1.0, "decode": 15.0}, "int8"),
        ({"prefill": 1.0, "decode": 200.0}, "int4"),
    ],
)  # fmt: skip
def test_the_fastest_within_the_budget_is_chosen(weights: dict[str, float], chosen: str) -> None:
    choice = choose(all_of(budget(perplexity=1.06)), weights)
    assert choice.best.name == chosen
    assert [each.is_good for each in choice.candidates] == [True, True, True, False]
    assert choice.ratio(choice.best).median == 1
    assert all(choice.ratio(each).median >= 1 for each in choice.candidates if each.is_good)


def test_cost_adds_up_the_phases_of_each_round() -> None:
    choice = choose(all_of(budget(perplexity=1.06)), {"prefill": 2.0, "decode": 10.0})
    assert choice.best.costs_ms(choice.weights) == [240.0, 260.0, 220.0]
    assert choice.cost_ms(choice.best) == 240


def test_budgets_of_quality_and_size() -> None:
    assert choose(all_of(budget()), {"decode": 1.0}).best.name == "int2"
    assert choose(all_of(budget(perplexity=1.03)), {"decode": 1.0}).best.name == "int8"
    assert choose(all_of(budget(perplexity=1.06), max_size_mb=100), {"prefill": 1.0}).best.name == "int4"
    verdict = all_of(budget(perplexity=1.03))[2].verdicts[0]
    assert verdict.sentence == "perplexity 21, required <= 20.6 (1.03x source): missed by 1.9%"


def test_each_smaller_and_slower_candidate_is_warned_of_by_phase() -> None:
    warnings = choose(all_of(budget()), {"decode": 1.0}).warnings
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("SMALLER BUT SLOWER in prefill: int4 (86 MB) takes 2.40x [")
    assert warnings[0].endswith("as long as int8 (170 MB), 120 against 50 ms")


def test_what_chance_explains_is_not_warned_of() -> None:
    small = candidate("a", 1, {"forward": [10.1, 9.0, 10.3]}, budget())
    large = candidate("b", 2, {"forward": [10.0, 10.0, 10.0]}, budget())
    choice = choose([small, large], {"prefill": 1.0})
    assert choice.weights == {"forward": 1.0}, "an encoder has one phase, whatever is preferred"
    assert choice.warnings == []


def test_rounds_are_means_over_prompts() -> None:
    figures = {
        "ttft_ms@8": {"round_medians": [1.0, 3.0]}, "ttft_ms@16": {"round_medians": [3.0, 5.0]},
        "tpot_ms@8": {"round_medians": [0.5, 0.5]},
    }  # fmt: skip
    assert rounds_ms({"figures": figures}) == {"prefill": [2.0, 4.0], "decode": [0.5, 0.5]}


def test_the_usual_budget_is_of_what_is_measured() -> None:
    assert Budget.usual({"perplexity": 20.0, "kl": 0.1}) == budget(perplexity=1.05)
    assert Budget.usual({"cosine": 0.9}) == budget(cosine=0.99)
    assert Budget.usual({"kl": 0.1, "top1_agreement": 0.5}) == budget(top1_agreement=0.98)
    (kl, cosine) = budget(kl=0.1, cosine=0.9).requirements("source", None)
    assert (str(kl), str(cosine)) == ("<= 0.1", ">= 0.9")
