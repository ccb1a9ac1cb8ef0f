"""A loaded model seen through its family's anatomy: layers, projections, norms and embeddings as torch modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn

from compress.mixers.spec import MixerSpec
from compress.models.anatomy import Family, ModelShape, shape_of


class Parts:
    """The modules of `model` by their role. `model` is a bare backbone or one with a head.

    Every accessor returns the live module: replacing weights in place changes the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shape: ModelShape = shape_of(cast(Any, model).config.to_dict())
        self.family: Family = self.shape.family
        name = self.family.backbone
        self.prefix = f"{name}." if hasattr(model, name) else ""
        self.backbone: nn.Module = getattr(model, name) if self.prefix else model

    @property
    def layers(self) -> nn.ModuleList:
        """The stack of layers."""
        return cast(nn.ModuleList, self.backbone.get_submodule(self.family.layers))

    def replace_layers(self, layers: Sequence[nn.Module]) -> None:
        """Put `layers` in place of the stack. Does not touch the config or the layers' own indices."""
        parent, _, leaf = self.family.layers.rpartition(".")
        setattr(self.backbone.get_submodule(parent), leaf, nn.ModuleList(layers))

    def layer_path(self, index: int) -> str:
        """The state-dict prefix of one layer, without the trailing dot: `model.layers.3`."""
        return f"{self.prefix}{self.family.layers}.{index}"

    def backbone_module(self, path: str) -> nn.Module | None:
        """A module of the backbone by the path that the anatomy gives; None where the family has none (`""`)."""
        return self.backbone.get_submodule(path) if path else None

    def attention(self, layer: nn.Module) -> nn.Module:
        """A layer's attention block."""
        return layer.get_submodule(self.family.attention.path)

    def projections(self, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path within the layer, module) of every matrix of a layer: attention or mixer first, then the MLP."""
        attention, mlp = self.family.attention, self.family.mlp
        for leaf in (attention.q, attention.k, attention.v, attention.qkv, attention.out):
            if leaf:
                path = f"{attention.path}.{leaf}"
                yield path, layer.get_submodule(path)
        spec: MixerSpec | None = getattr(self.attention(layer), "spec", None)
        for leaf in spec.rates(self.shape.num_attention_heads, self.shape.num_key_value_heads) if spec else ():
            path = f"{attention.path}.{leaf}"
            yield path, layer.get_submodule(path)
        for path in (mlp.gate, mlp.up, mlp.down):
            if path:
                yield path, layer.get_submodule(path)

    @property
    def lm_head(self) -> nn.Module | None:
        """The output head of a causal decoder; None for a backbone or an encoder."""
        return getattr(self.model, self.family.lm_head, None) if self.family.lm_head else None
