"""What quality a format may cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from compress.pipeline.require import Operator, Requirement

_HOLD: Mapping[str, Operator] = {"perplexity": "<=", "kl": "<=", "top1_agreement": ">=", "cosine": ">="}


class Budget(BaseModel):
    """Limits on figures that `evaluate` takes of each format; all that are given must hold. Empty: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float | None = Field(None, gt=0, description="at most so many times that of `against`")
    kl: float | None = Field(None, gt=0, description="at most so many nats from `against`")
    top1_agreement: float | None = Field(None, gt=0, le=1, description="at least this share of likeliest tokens alike")
    cosine: float | None = Field(None, gt=0, le=1, description="of an encoder's embeddings with `against`'s: at least")

    @classmethod
    def usual(cls, measured: Mapping[str, float]) -> Self:
        """The one for a model that these figures can be measured of, where none is given."""
        limits = {"perplexity": 1.05, "cosine": 0.99, "top1_agreement": 0.98}
        name = next((name for name in limits if name in measured), "top1_agreement")
        return cls.model_validate({name: limits[name]})

    def requirements(self, against: str, max_size_mb: float | None) -> list[Requirement]:
        """The same as lines of `require`, perplexity as a factor of that of `against`; and one for the size."""
        limits = {name: limit for name in _HOLD if (limit := getattr(self, name)) is not None}
        found = [
            Requirement(name, _HOLD[name], limit, against if name == "perplexity" else "", f"budget.{name}")
            for name, limit in limits.items()
        ]
        if max_size_mb is not None:
            found.append(Requirement("size_mb", "<=", max_size_mb, "", "max_size_mb"))
        return found
