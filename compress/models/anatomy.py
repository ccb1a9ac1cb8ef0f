"""The anatomy of each model family: where its parts are, told once, for pruning, quantising and exporting.

Imports no torch, so that `compress check` can reason about a model from its `config.json` alone. Paths are attribute
paths of the `transformers` classes (5.x); those of a layer's parts are relative to the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from compress.errors import InvalidInput
from compress.mixers.spec import FULL, LINEAR, SLIDING, SPECS, FeatureMap, MixerSpec, read_specs
from compress.mixers.widths import LayerWidths, widths_fault, with_entry
from compress.models.config import FLAG, FROM_ZERO, HYBRID, Rule, fault_of, rope_of, value_fault, with_defaults
from compress.models.heads import BACKBONE, Head, Kind, architecture_of, named_head

DTYPE_KEYS = ("dtype", "torch_dtype")
"""What `config.json` calls the type of the weights; transformers 4 knows the second only."""
_BUFFER = re.compile(
    r"(^|\.)((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq|embeddings\.(position|token_type)_ids)$"
)


def is_buffer(name: str) -> bool:
    """Whether a tensor of a file is no weight but what older versions stored beside them: masks, positions, rates."""
    return _BUFFER.search(name) is not None


@dataclass(frozen=True)
class Attention:
    """Projections of one attention block. Either `q`, `k`, `v` or the fused `qkv` is set.

    `qkv_layout` says how the rows of `qkv` lie: `stacked` is [q; k; v], `per_head` is [q_h; k_h; v_h] head by head.
    """

    path: str
    out: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    qkv_layout: Literal["", "stacked", "per_head"] = ""
    q_norm: str = ""
    k_norm: str = ""


@dataclass(frozen=True)
class Mlp:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where there is no gate."""

    up: str
    down: str
    gate: str = ""


@dataclass(frozen=True)
class Family:
    """One family of transformers.

    residual: `pre` x+attn(norm(x)) then x+mlp(norm(x)); `parallel` x+attn(norm1(x))+mlp(norm2(x));
    `post` norm(x+attn(x)) then norm(x+mlp(x)). In `post` the two norms are those after each block.
    `hybrids`: our own model types of it, whose layers may differ in width; `takes_mixers`: or have mixers in place of
    their attention.
    `conv1d`: the projections are `transformers.pytorch_utils.Conv1D`, whose weights are (in, out).
    `tied_heads`: `config.json` has no `head_dim`: a head is hidden_size / num_attention_heads wide.
    `keys`: where `config.json` has another word for Hugging Face's common key.
    """

    name: str
    model_types: tuple[str, ...]
    kind: Kind
    backbone: str
    layers: str
    token_embedding: str
    attention: Attention
    mlp: Mlp
    attention_norm: str
    mlp_norm: str
    norm: Literal["rms", "layer"]
    residual: Literal["pre", "parallel", "post"]
    position: Literal["rotary", "learned"]
    final_norm: str = ""
    position_embedding: str = ""
    type_embedding: str = ""
    embedding_norm: str = ""
    lm_head: str = ""
    hybrids: tuple[str, ...] = ()
    takes_mixers: bool = False
    conv1d: bool = False
    tied_heads: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)

    def key(self, common: str) -> str:
        """This family's word in `config.json` for Hugging Face's common key."""
        return self.keys.get(common, common)

    def is_hybrid(self, model_type: str) -> bool:
        """Whether that is one of `hybrids`."""
        return model_type in self.hybrids


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    kind="decoder",
    backbone="model",
    layers="layers",
    token_embedding="embed_tokens",
    attention=Attention(
        path="self_attn", q="q_proj", k="k_proj", v="v_proj", out="o_proj", q_norm="q_norm", k_norm="k_norm"
    ),
    mlp=Mlp(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    norm="rms",
    residual="pre",
    position="rotary",
    final_norm="norm",
    lm_head="lm_head",
    hybrids=("hybrid_llama", "hybrid_mistral", "hybrid_qwen2", "hybrid_qwen3"),
    takes_mixers=True,
    keys={"norm_eps": "rms_norm_eps"},
)

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    kind="decoder",
    backbone="gpt_neox",
    layers="layers",
    token_embedding="embed_in",
    attention=Attention(path="attention", qkv="query_key_value", qkv_layout="per_head", out="dense"),
    mlp=Mlp(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    norm="layer",
    residual="parallel",  # `use_parallel_residual: false` in config.json means pre: see ModelShape.residual
    position="rotary",
    final_norm="final_layer_norm",
    lm_head="lm_head",
    hybrids=("hybrid_gpt_neox",),
    tied_heads=True,
    keys={"norm_eps": "layer_norm_eps"},
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    kind="decoder",
    backbone="transformer",
    layers="h",
    token_embedding="wte",
    position_embedding="wpe",
    attention=Attention(path="attn", qkv="c_attn", qkv_layout="stacked", out="c_proj"),
    mlp=Mlp(up="mlp.c_fc", down="mlp.c_proj"),
    attention_norm="ln_1",
    mlp_norm="ln_2",
    norm="layer",
    residual="pre",
    position="learned",
    final_norm="ln_f",
    lm_head="lm_head",
    hybrids=("hybrid_gpt2",),
    conv1d=True,
    tied_heads=True,
    keys={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
)

BERT = Family(
    name="bert",
    model_types=("bert",),
    kind="encoder",
    backbone="bert",
    layers="encoder.layer",
    token_embedding="embeddings.word_embeddings",
    position_embedding="embeddings.position_embeddings",
    type_embedding="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    attention=Attention(path="attention", q="self.query", k="self.key", v="self.value", out="output.dense"),
    mlp=Mlp(up="intermediate.dense", down="output.dense"),
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    norm="layer",
    residual="post",
    position="learned",
    hybrids=("hybrid_bert",),
    takes_mixers=True,
    tied_heads=True,
    keys={"norm_eps": "layer_norm_eps"},
)

FAMILIES = (LLAMA, GPT_NEOX, GPT2, BERT)


@dataclass(frozen=True)
class ModelShape:
    """What a `config.json` says of a model's size, in Hugging Face's words whatever its family.

    mixers: one entry a layer, None where its attention is softmax; empty for a model that was never converted.
    layer_widths: one entry a layer where they differ: `of_layer` has them in place; the numbers here are the config's.
    own_v_head_dim: lanes of a head's values, where they are not head_dim. layer_types: `full_attention`,
    `sliding_attention` or `linear_attention` for each layer, where the file has it.
    layers_guessed: of those two only the numbers are known yet, not which layers. attention_features: what the softmax
    attention has that no mixer can carry over, in the words of `config.json`. rotary_dim: lanes of a head that turn, 0
    where positions are learned. scales_by_layer: q·k is divided by the layer's own number. head: None where the file
    names no class that is known. num_labels, problem_type: a classifier's. bytes_per_weight: on disk.
    """

    family: Family
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    residual: Literal["pre", "parallel", "post"]
    mixers: tuple[MixerSpec | None, ...] = ()
    layer_widths: tuple[LayerWidths, ...] = ()
    own_v_head_dim: int | None = None
    layer_types: tuple[str, ...] = ()
    layers_guessed: bool = False
    attention_features: tuple[str, ...] = ()
    hidden_act: str = ""
    rope_type: str = "default"
    rotary_dim: int = 0
    scales_by_layer: bool = False
    head: Head | None = None
    num_labels: int = 2
    problem_type: str = ""
    bytes_per_weight: float = 4.0

    @property
    def has_head(self) -> bool:
        """Whether it has outputs beyond its last hidden states."""
        return self.head is not None and self.head is not BACKBONE

    @property
    def fills_masks(self) -> bool:
        """Whether it is a masked language model, which says what stood where tokens are hidden."""
        return self.head is not None and self.head.task == "masked"

    @property
    def unjudged(self) -> str:
        """What a head says that no softmax over classes judges or teaches, in words; `""` where one does."""
        if self.head is None or self.head.task != "classification":
            return ""
        if self.problem_type == "multi_label_classification":
            return "a multi-label head, which says yes or no to each label"
        one = self.num_labels == 1 or self.problem_type == "regression"
        return "a head of one number (regression, a cross-encoder)" if one else ""

    @property
    def v_head_dim(self) -> int:
        """Lanes of a head's values."""
        return self.head_dim if self.own_v_head_dim is None else self.own_v_head_dim

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of the matrices of one layer (norms, biases and what a mixer adds, under 1 %, left out)."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        attention = self.hidden_size * (heads + groups) * (self.head_dim + self.v_head_dim)
        return attention + (3 if self.family.mlp.gate else 2) * self.hidden_size * self.intermediate_size

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the token and position embeddings and of an untied output head."""
        tables = 1 if self.tie_word_embeddings or self.family.kind == "encoder" else 2
        positions = self.max_position_embeddings if self.family.position == "learned" else 0
        return (tables * self.vocab_size + positions) * self.hidden_size

    @property
    def num_mixer_parameters(self) -> int:
        """Parameters that the mixers of all layers have beyond the attention that they replace."""
        layers = ((self.of_layer(layer), spec) for layer, spec in enumerate(self.mixers) if spec is not None)
        return sum(
            spec.num_parameters(
                own.hidden_size, own.num_attention_heads, own.num_key_value_heads, own.head_dim, own.v_head_dim
            )
            for own, spec in layers
        )

    @property
    def weight_bytes(self) -> float:
        """Estimated bytes of the weights on disk."""
        return self.bytes_per_weight * self.num_parameters

    @property
    def in_float32(self) -> ModelShape:
        """The same with its weights stored in float32, as those are that were trained."""
        return replace(self, bytes_per_weight=4.0)

    @property
    def num_parameters(self) -> int:
        """Estimated parameters of the whole model."""
        layers = sum(self.of_layer(layer).num_layer_parameters for layer in range(self.num_hidden_layers))
        return layers + self.num_mixer_parameters + self.num_embedding_parameters

    def of_layer(self, layer: int) -> ModelShape:
        """The same with the widths of one layer."""
        if not self.layer_widths:
            return self
        own = self.layer_widths[layer]
        return replace(
            self, num_attention_heads=own.num_attention_heads, num_key_value_heads=own.num_key_value_heads,
            intermediate_size=own.intermediate_size, own_v_head_dim=own.v_head_dim, layer_widths=(),
        )  # fmt: skip

    def of_layers(self, kept: Sequence[int]) -> ModelShape:
        """The same model with only the layers `kept`."""
        mixers = tuple(self.mixers[index] for index in kept) if self.mixers else ()
        layer_types = tuple(self.layer_types[index] for index in kept) if self.layer_types else ()
        widths = tuple(self.layer_widths[index] for index in kept) if self.layer_widths else ()
        return replace(
            self, num_hidden_layers=len(kept), mixers=mixers, layer_types=layer_types, layer_widths=widths
        )


def family_of(model_type: str, where: str = "model") -> Family:
    """The family of a Hugging Face `model_type`. Raises InvalidInput, naming what is supported, for any other."""
    family = _known_family(model_type)
    if family is not None:
        return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise InvalidInput(where, f"model_type {model_type!r} is not supported", f"supported: {known}")


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """The kind of the family of a parsed `config.json`; None for one that is not known here."""
    family = _known_family(config.get("model_type"))
    return family.kind if family else None


def _known_family(model_type: object) -> Family | None:
    return next((family for family in FAMILIES if model_type in (*family.model_types, *family.hybrids)), None)


def shape_of(config: Mapping[str, Any], where: str = "model") -> ModelShape:
    """The shape that a parsed `config.json` declares. Raises InvalidInput for an unsupported or incomplete one."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InvalidInput(where, "config.json has no model_type", "is this a transformers model?")
    family = family_of(model_type, where)

    config = with_defaults(config, model_type)
    if fault := value_fault(config, family.keys):
        raise InvalidInput(where, f"config.json: {fault}", "correct it, or get the file again")

    def number(common: str, default: int | None = None) -> int:
        value = config.get(family.key(common))
        value = default if value is None else value
        if value is None:
            raise InvalidInput(where, f"config.json has no whole number {family.key(common)!r}", "is it complete?")
        return int(value)

    hidden_size, num_heads = number("hidden_size"), number("num_attention_heads")
    num_layers, groups, head_dim = number("num_hidden_layers"), num_heads, hidden_size // num_heads
    if not family.tied_heads:
        groups = number("num_key_value_heads", num_heads)
    if not family.tied_heads or family.is_hybrid(model_type):
        head_dim = number("head_dim", head_dim)
    rope = rope_of(config)
    shape = ModelShape(
        family=family,
        model_type=model_type,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size", 4 * hidden_size),
        num_attention_heads=num_heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings"),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        residual="pre" if config.get("use_parallel_residual") is False else family.residual,
        mixers=_mixers(config, num_layers, where),
        layer_types=_layer_types(config, num_layers),
        attention_features=tuple(_attention_features(config)),
        hidden_act=config[family.key("hidden_act")],
        rope_type=rope["rope_type"],
        rotary_dim=int(head_dim * rope["partial_rotary_factor"]) if family.position == "rotary" else 0,
        scales_by_layer=config.get("scale_attn_by_inverse_layer_idx", False),
        head=named_head(architecture_of(config)),
        num_labels=_num_labels(config),
        problem_type=config.get("problem_type") or "",
        bytes_per_weight=2.0 if any(config.get(key) in ("bfloat16", "float16") for key in DTYPE_KEYS) else 4.0,
    )
    if fault := _misfit(config, shape):
        raise InvalidInput(where, f"config.json: {fault}", "correct it, or get the file again")
    return replace(shape, layer_widths=_layer_widths(config, shape, where))


def _layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """`full_attention` or `sliding_attention` of each layer, where the file has them or follows from Qwen's keys."""
    said, first = config.get("layer_types"), config.get("max_window_layers")
    if said is not None or first is None:
        return tuple(said or ())
    slides = config.get("use_sliding_window") and config.get("sliding_window")
    return tuple(SLIDING if slides and layer >= first else FULL for layer in range(num_layers))


def _misfit(config: Mapping[str, Any], shape: ModelShape) -> str:
    """What numbers that are right each by itself make impossible together; "" where they fit."""
    heads, groups, hidden = shape.num_attention_heads, shape.num_key_value_heads, shape.hidden_size
    hybrid, types = shape.family.is_hybrid(shape.model_type), shape.layer_types
    divides = shape.family.tied_heads or shape.model_type == "llama"
    if heads % groups:
        return f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    if hidden % heads and divides and not hybrid:
        return f"{shape.family.key('hidden_size')} {hidden} is no multiple of {heads} heads"
    if not shape.head_dim:
        return f"hidden_size {hidden} is too small for {heads} heads"
    if shape.rotary_dim == shape.head_dim and shape.head_dim % 2:
        return f"heads of {shape.head_dim} lanes can't be turned by halves"
    if shape.family.position == "rotary" and shape.rotary_dim < 1:
        return f"partial_rotary_factor leaves none of {shape.head_dim} lanes to turn"
    told = bool(types) or (not hybrid and config.get("layer_types") is not None)
    if told and len(types) != shape.num_hidden_layers:
        return f"layer_types has {len(types)} entries for {shape.num_hidden_layers} layers"
    if LINEAR in types and not hybrid:
        return f"layer_types has {LINEAR}, which no {shape.model_type} has"
    windowed = config.get("sliding_window") and (hybrid or config.get("use_sliding_window", True))
    if SLIDING in types and not windowed:
        return f"layer_types has {SLIDING}, and there is no sliding_window"
    return ""


def _num_labels(config: Mapping[str, Any]) -> int:
    named, told = config.get("id2label"), config.get("num_labels")
    return len(named) if isinstance(named, dict) else told if isinstance(told, int) else 2


def _layer_widths(config: Mapping[str, Any], shape: ModelShape, where: str) -> tuple[LayerWidths, ...]:
    entries = config.get("layer_widths") if shape.model_type.startswith(HYBRID) else None
    mixed = [spec is not None for spec in shape.mixers or (None,) * shape.num_hidden_layers]
    grouped = not shape.family.tied_heads
    if fault := widths_fault(entries, shape.num_hidden_layers, mixed, grouped):
        raise InvalidInput(where, f"config.json: {fault}", "was it written by another version?")
    return tuple(with_entry(shape, entry, grouped) for entry in entries or ())


_MIXER_RULES: Mapping[str, Rule] = {
    "type": Rule(f"one of {', '.join(SPECS)}", lambda value: value in tuple(SPECS)),
    "feature_map": Rule(f"one of {', '.join(get_args(FeatureMap))}", lambda value: value in get_args(FeatureMap)),
    "decay": Rule("none, scalar or dt", lambda value: value in ("none", "scalar", "dt")),
    **dict.fromkeys(("normalised", "gate", "beta"), FLAG),
    **dict.fromkeys(("conv_kernel", "window"), FROM_ZERO),
}


def _mixer_fault(spec: MixerSpec) -> str:
    faults = (fault_of(name, getattr(spec, name), rule) for name, rule in _MIXER_RULES.items())
    return next(filter(None, faults), "")


def _mixers(config: Mapping[str, Any], num_layers: int, where: str) -> tuple[MixerSpec | None, ...]:
    if not str(config["model_type"]).startswith(HYBRID) or "mixers" not in config:
        return ()
    try:
        mixers = read_specs(config)
    except TypeError as error:
        what = f"config.json has a mixer that can't be read ({error})"
        raise InvalidInput(where, what, "was it converted by another version?") from error
    if fault := next(filter(None, (_mixer_fault(spec) for spec in mixers if spec)), ""):
        what = f"config.json has a mixer whose {fault}"
        raise InvalidInput(where, what, "was it converted by another version?")
    if len(mixers) != num_layers:
        what = f"config.json has {len(mixers)} mixers for {num_layers} layers"
        raise InvalidInput(where, what, "give one entry a layer, null for softmax")
    return mixers


def _attention_features(config: Mapping[str, Any]) -> Iterator[str]:
    """What this attention does beside softmax over rotated (or plain) queries and keys of all tokens before."""
    positions = config.get("position_embedding_type", "absolute")
    if config.get("alibi") or positions == "alibi":
        yield "ALiBi"
    elif positions != "absolute":
        yield f"position_embedding_type {positions}"
    if str(config["model_type"]).endswith("bert") and config.get("is_decoder"):
        yield "is_decoder, which hides the tokens to come"
    for key in ("attn_logit_softcapping", "attention_logit_softcapping", "attention_sinks", "num_attention_sinks"):
        if config.get(key):
            yield f"{key} {config[key]}"
    share = rope_of(config)["partial_rotary_factor"]
    if share != 1.0:
        yield f"partial_rotary_factor {share}"
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and config.get("layer_types") is None and config.get("max_window_layers") is None:
        yield f"sliding_window {window} in every layer"
