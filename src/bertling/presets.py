"""The shape of a model as plain values: what ModelConfig holds, and tables of it for each preset and size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from bertling.files import BertlingError

Architecture = Literal["seed", "bert", "distilbert", "modern"]
Positions = Literal["learned", "sinusoidal", "rotary"]
Pooler = Literal["none", "tanh", "relu", "gelu"]
Pooling = Literal["cls", "mean"]

# Far above any BERT, far below what would hang or exhaust a machine that is handed a damaged config.json.
LIMITS = {
    "vocab_size": 2**22,
    "hidden_size": 2**14,
    "num_hidden_layers": 2**9,
    "num_attention_heads": 2**10,
    "intermediate_size": 2**17,
    "max_position_embeddings": 2**17,
    "type_vocab_size": 2**10,
    "global_attn_every_n_layers": 2**9,
    "local_attention": 2**18,
    "pad_token_id": 2**22,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that shapes a model; names as in Hugging Face's configurations. The presets below give the values."""

    architecture: Architecture
    """The stock class that this anatomy belongs to (`seed` has none)."""
    vocab_size: int
    """Entries of the vocabulary."""
    hidden_size: int
    """Width of the residual stream, D."""
    num_hidden_layers: int
    """Number of blocks."""
    num_attention_heads: int
    """Heads in each attention, H; must divide hidden_size."""
    intermediate_size: int
    """Width inside the MLP."""
    max_position_embeddings: int
    """Longest input, in tokens."""
    type_vocab_size: int
    """Number of segment embeddings; 0 for none."""
    pad_token_id: int
    """Id of [PAD], whose embedding is not learned from the input."""
    layer_norm_eps: float
    """Added to the variance in every LayerNorm."""
    initializer_range: float
    """Standard deviation of fresh weights."""
    embedding_dropout_prob: float
    """Dropout on the embeddings."""
    attention_probs_dropout_prob: float
    """Dropout on the attention weights."""
    attention_output_dropout_prob: float
    """Dropout on what attention adds to the residual stream."""
    hidden_dropout_prob: float
    """Dropout in the MLP."""
    classifier_dropout: float
    """Dropout before the classifier."""
    positions: Positions
    """How a token's place is told: learned or sinusoidal vectors added to its embedding, or rotary in attention."""
    rope_theta: float
    """Base of the rotary frequencies in blocks that look everywhere."""
    local_rope_theta: float
    """The same in local blocks."""
    global_attn_every_n_layers: int
    """Every so many-th block looks everywhere, the first one included; the others are local. 1: all look everywhere."""
    local_attention: int
    """Tokens in the window of a local block: half of them on either side of each token."""
    norm_first: bool
    """LayerNorm before attention and MLP (pre-norm) instead of after the sum (post-norm)."""
    embedding_norm: bool
    """LayerNorm on the embeddings."""
    first_attention_norm: bool
    """LayerNorm before the first attention too; needless where the embeddings are normalised."""
    final_norm: bool
    """LayerNorm after the last block."""
    glu: bool
    """Gated MLP (GeGLU) instead of a plain one."""
    bias: bool
    """Biases in linear layers and norms; the last layer of each head has one in any case."""
    mlm_dense: bool
    """A dense layer and GELU before the norm of the masked-word head."""
    tied: bool
    """The masked-word head uses the word embeddings as its matrix."""
    pooling: Pooling
    """What the classifier is told: the vector of [CLS], or the mean over all tokens."""
    pooler: Pooler
    """Activation of the dense layer between this and the classifier; `gelu` has a LayerNorm after it."""
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    """Names of the classes, by id."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_local(self, layer: int) -> bool:
        """Whether the block of this number, from 0, sees a window only."""
        return layer % self.global_attn_every_n_layers != 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the vocabulary matrix in memory: matrix kernels are faster on multiples of 64."""
        return -(-self.vocab_size // 64) * 64

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    def __post_init__(self) -> None:
        for field in fields(self):
            check_field(field.name, getattr(self, field.name), field.type)
        if self.hidden_size % self.num_attention_heads:
            raise BertlingError(
                f"num_attention_heads = {self.num_attention_heads} does not divide hidden_size = {self.hidden_size}; "
                "choose a number of heads that does"
            )
        if (self.head_dim if self.positions == "rotary" else self.hidden_size) % 2:
            raise BertlingError(
                f"hidden_size = {self.hidden_size} with num_attention_heads = {self.num_attention_heads}: positions "
                "are pairs of columns; choose sizes that make the width of a head even"
            )
        if self.pad_token_id >= self.vocab_size:
            raise BertlingError(
                f"pad_token_id = {self.pad_token_id} lies outside vocab_size = {self.vocab_size}; "
                "give the id of [PAD] in this vocabulary"
            )


def check_field(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of the wrong type or out of range, by name."""
    if kind is int:
        lowest = 0 if name in ("type_vocab_size", "pad_token_id") else 1
        good, wanted = type(value) is int and lowest <= value <= LIMITS[name], f"an integer, {lowest} to {LIMITS[name]}"
    elif kind is float and "dropout" in name:
        good, wanted = type(value) in (int, float) and 0 <= value < 1, "a number from 0 up to, but not, 1"
    elif kind is float:
        good, wanted = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
    elif kind is bool:
        good, wanted = type(value) is bool, "true or false"
    elif get_origin(kind) is Literal:
        good, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    else:
        names = isinstance(value, tuple) and all(isinstance(label, str) for label in value)
        good, wanted = names and 0 < len(set(value)) == len(value), "one or more names, all different"
    if not good:
        raise BertlingError(f"{name} = {value!r:.60}: this must be {wanted}; correct the value")


# Blocks, width, heads. `base` has as many blocks as each original; `modern`, as many as BERT (ModernBERT-base has 22).
SIZES: dict[str, tuple[int, int, int]] = {"mini": (4, 256, 4), "small": (6, 512, 8), "base": (12, 768, 12)}
BASE_LAYERS: dict[str, int] = {"seed": 6, "bert": 12, "distilbert": 6, "modern": 12}
LOCAL_PATTERN = 3
"""Where windows are asked for, every third block still sees the whole row, as in ModernBERT."""

# What BertForMaskedLM and its kind are made of (Devlin et al. 2019).
BERT: dict[str, Any] = {
    "architecture": "bert",
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "embedding_dropout_prob": 0.1,  # as published; the setting `dropout` replaces all five
    "attention_probs_dropout_prob": 0.1,
    "attention_output_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "classifier_dropout": 0.1,
    "positions": "learned",
    "rope_theta": 10_000.0,
    "local_rope_theta": 10_000.0,
    "global_attn_every_n_layers": 1,
    "local_attention": 128,
    "norm_first": False,
    "embedding_norm": True,
    "first_attention_norm": True,
    "final_norm": False,
    "glu": False,
    "bias": True,
    "mlm_dense": True,
    "tied": True,
    "pooling": "cls",
    "pooler": "tanh",
}

PRESETS: dict[str, dict[str, Any]] = {
    # The project that this one grew from: pre-norm, fixed positions, the plainest heads.
    "seed": BERT
    | {
        "architecture": "seed",
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-5,
        "positions": "sinusoidal",
        "norm_first": True,
        "embedding_norm": False,
        "mlm_dense": False,
        "tied": False,
        "pooler": "none",
    },
    "bert": BERT,
    # Sanh et al. 2019: BERT without segments, with another pooler and no dropout after attention.
    "distilbert": BERT
    | {
        "architecture": "distilbert",
        "type_vocab_size": 0,
        "attention_output_dropout_prob": 0.0,
        "classifier_dropout": 0.2,
        "pooler": "relu",
    },
    # The parts of ModernBERT (Warner et al. 2024) in our sizes; rotary base as in Su et al. 2021, windows on demand.
    "modern": BERT
    | {
        "architecture": "modern",
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-5,
        "embedding_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attention_output_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
        "positions": "rotary",
        "norm_first": True,
        "first_attention_norm": False,
        "final_norm": True,
        "glu": True,
        "bias": False,
        "pooling": "mean",
        "pooler": "gelu",
    },
}


def preset_config(
    name: str,
    size: str,
    vocab_size: int,
    *,
    max_position_embeddings: int,
    pad_token_id: int,
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
    local_attention: int | None = None,
    dropout: float | None = None,
    labels: Sequence[str] | None = None,
) -> ModelConfig:
    """The configuration of a preset in a size; sizes given explicitly win, `dropout` replaces the preset's own.

    `local_attention` asks for windows of so many tokens, which only `modern` can have.
    """
    if name not in PRESETS:
        raise BertlingError(f"preset = {name!r}: no such preset; choose one of {', '.join(PRESETS)}")
    if size not in SIZES:
        raise BertlingError(f"size = {size!r}: no such size; choose one of {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    width = width if hidden_size is None else hidden_size
    heads = heads if num_attention_heads is None else num_attention_heads
    if width % heads:
        raise BertlingError(f"heads = {heads} does not divide d-model = {width}: choose heads that do")
    if size == "base":
        layers = BASE_LAYERS[name]
    values = PRESETS[name] | {
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "pad_token_id": pad_token_id,
        "hidden_size": width,
        "num_hidden_layers": layers if num_hidden_layers is None else num_hidden_layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp_width(width, glu=PRESETS[name]["glu"]),
    }
    if local_attention is not None:
        if name != "modern":
            raise BertlingError(f"local-attention: the preset {name} has no windows; leave it out, or use modern")
        values |= {"local_attention": local_attention, "global_attn_every_n_layers": LOCAL_PATTERN}
    if dropout is not None:
        values |= dropout_values(name, dropout)
    if labels is not None:
        values["labels"] = tuple(labels)
    return ModelConfig(**values)


def mlp_width(hidden_size: int, *, glu: bool) -> int:
    """Four times the width; two thirds of that, in multiples of 64, where a gate adds a third matrix (Shazeer 2020)."""
    return max(1, round(hidden_size * 8 / 3 / 64)) * 64 if glu else 4 * hidden_size


def dropout_values(architecture: str, dropout: float) -> dict[str, Any]:
    """One share of dropout for every place that an architecture can have it at: all five, four in DistilBERT."""
    return {
        "embedding_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "attention_output_dropout_prob": 0.0 if architecture == "distilbert" else dropout,
        "hidden_dropout_prob": dropout,
        "classifier_dropout": dropout,
    }
