"""The anatomy of a BERT: embeddings, blocks, and the two heads (masked words, classification). No IO, no globals.

Read `BertForMaskedLM.forward` first, then Embeddings, Blocks, Block and MLP; SelfAttention is in attention.py, and the
tables of values that make all this BERT, DistilBERT or ModernBERT are in presets.py.

A token is a vector of D numbers all the way through, the residual stream [B, T, D]; each block adds to it. `wanted` [M]
names the tokens whose result someone reads, by row * T + column: the last block's attention still mixes all tokens,
but only the wanted ones go on through its output matrix, its MLP and the head.
Shapes: B batch, T tokens, D hidden, I inside the MLP, V vocabulary, P vocabulary filled up to a multiple of 64,
M wanted tokens, L labels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertling.attention import (
    Dropout,
    SelfAttention,
    Sight,
    padding_mask,
    rotary_angles,
    sinusoidal_positions,
    window_mask,
)
from bertling.files import BertlingError
from bertling.presets import ModelConfig as ModelConfig
from bertling.presets import Pooler
from bertling.presets import Pooling as Pooling


class Embeddings(nn.Module):
    """What a token is; in some presets plus where it stands and which segment it belongs to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size = config.hidden_size
        self.word_embeddings = Table(config.padded_vocab_size, hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = self.token_type_embeddings = None
        if config.positions == "learned":
            self.position_embeddings = Table(config.max_position_embeddings, hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = Table(config.type_vocab_size, hidden_size)
        self.norm = layer_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.embedding_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """[B, T] -> [B, T, D]; segments default to 0."""
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise BertlingError(
                f"input of {length} tokens: this model has max_position_embeddings = "
                f"{self.config.max_position_embeddings}; cut the input"
            )
        x = self.word_embeddings(input_ids)  # [B, T, D]
        if self.config.positions == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4; else the sines, near 1, would drown the small word vectors.
            x = x * math.sqrt(self.config.hidden_size)
            x = x + sinusoidal_positions(length, self.config.hidden_size, x.device).to(x.dtype)
        if self.token_type_embeddings is not None:
            segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(segments)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings.weight[:length]
        return self.dropout(self.norm(x))


class MLP(nn.Module):
    """Each token on its own: widen, bend, narrow. Gated (GeGLU, Shazeer 2020), one half scales the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.glu = config.glu
        width = config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, 2 * width if config.glu else width, bias=config.bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.bias)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        if self.glu:
            x, gate = self.up_proj(x).chunk(2, dim=-1)  # [B, T, I] each
            x = self.down_proj(self.dropout(F.gelu(x) * gate))  # [B, T, D]; dropout where ModernBERT has it
        else:
            x = self.dropout(self.down_proj(F.gelu(self.up_proj(x))))  # [B, T, D]; where BERT has it
        return x


class Block(nn.Module):
    """Attention between tokens, then an MLP on each; both add to the residual stream."""

    def __init__(self, config: ModelConfig, *, attention_norm: bool) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = layer_norm(config) if attention_norm else nn.Identity()
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            bias=config.bias,
            dropout=config.attention_probs_dropout_prob,
        )
        self.dropout = Dropout(config.attention_output_dropout_prob)
        self.mlp_norm = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, sight: Sight, wanted: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; or -> [M, D] with `wanted` [M]: these look at all tokens, the rest is dropped."""
        residual = x if wanted is None else x.flatten(0, 1).index_select(0, wanted)  # [B, T, D] -> [B * T, D] -> [M, D]
        if self.norm_first:  # each part reads a normalised copy; the stream itself passes, and so do gradients
            mixed = self.attention(self.attention_norm(x), sight, wanted)
            x = residual + self.dropout(mixed)
            x = x + self.mlp(self.mlp_norm(x))
        else:  # as in the first BERT: the sum itself is normalised
            mixed = self.attention(x, sight, wanted)
            x = self.attention_norm(residual + self.dropout(mixed))
            x = self.mlp_norm(x + self.mlp(x))
        return x


class Blocks(nn.Module):
    """The blocks, one after another."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            Block(config, attention_norm=config.first_attention_norm or i > 0) for i in range(config.num_hidden_layers)
        )
        self.final_norm = layer_norm(config) if config.final_norm else nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `attention_mask` [B, T] is 1 or True where a token counts, None where all do.

        With `wanted` [M] the last block ends at these tokens, [M, D]: no one reads the others.
        """
        is_local = [self.config.is_local(i) for i in range(len(self.layers))]
        # Masks and angles are made once for each kind of block: those that see the whole row, and those with a window.
        sights = {local: self.sight(x, attention_mask, local=local) for local in set(is_local)}
        for i, block in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            x = block(x, sights[is_local[i]], wanted if is_last else None)
        return self.final_norm(x)

    def sight(self, x: Tensor, attention_mask: Tensor | None, *, local: bool) -> Sight:
        """What the blocks that look everywhere, or the `local` ones, are told about the places of `x` [B, T, D]."""
        config, length = self.config, x.shape[1]
        visible = None if attention_mask is None else padding_mask(attention_mask)
        if local:
            visible = window_mask(length, config.local_attention // 2, visible, x.device)
        rotary = None
        if config.positions == "rotary":
            theta = config.local_rope_theta if local else config.rope_theta
            exact = torch.promote_types(x.dtype, torch.float32)  # in bf16, far angles would be noise
            rotary = rotary_angles(length, config.head_dim, theta, x.device, exact)
        return Sight(visible, rotary)


class BertEncoder(nn.Module):
    """Token ids to contextual vectors: what both heads below stand on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, [B, T] -> [B, T, D], or [M, D] of the tokens `wanted` [M] alone.

        Segments are ignored by a model without segment embeddings.
        """
        return self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask, wanted)


class HeadTransform(nn.Module):
    """What a head does before its last matrix: a dense layer, an activation, a LayerNorm; each part may be absent."""

    def __init__(self, config: ModelConfig, *, activation: Pooler, norm: bool) -> None:
        super().__init__()
        self.activation = activation
        width = config.hidden_size
        self.dense = nn.Identity() if activation == "none" else nn.Linear(width, width, bias=config.bias)
        self.norm = layer_norm(config) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = self.dense(x)
        if self.activation == "tanh":
            x = x.tanh()
        elif self.activation == "relu":
            x = F.relu(x)
        elif self.activation == "gelu":
            x = F.gelu(x)
        return self.norm(x)


class MaskedLMHead(nn.Module):
    """Hidden states to a score for each entry of the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = HeadTransform(config, activation="gelu" if config.mlm_dense else "none", norm=True)
        self.decoder = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., P], the padded columns at minus infinity: they never win, nor count in a softmax."""
        bias = F.pad(self.bias, (0, self.decoder.out_features - len(self.bias)), value=float("-inf"))
        return F.linear(self.transform(x), self.decoder.weight, bias)


class MaskedOutput(NamedTuple):
    """What one batch says about masked words."""

    loss_sum: Tensor
    """Cross-entropy in nats, summed over the labels that are not -100 (who trains divides); in fp32 at least."""
    correct: Tensor | None
    """How many of these labels got the highest score; not counted while training."""


class BertForMaskedLM(BertEncoder):
    """Guess the masked words (Devlin et al. 2019, section 3.1)."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.mlm_head = MaskedLMHead(config)
        self.tie_weights()
        initialize(self, config, generator)

    def tie_weights(self) -> None:
        """Let the head share the word embeddings' matrix, where the configuration says so."""
        if self.config.tied:
            self.mlm_head.decoder.weight = self.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        wanted: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | MaskedOutput:
        """Logits [B, T, V]; with `wanted` [M] logits [M, V]; with `labels` a MaskedOutput.

        `labels` belong to `wanted`, or are [B, T] without them; -100 marks what is not scored.
        Only the tokens wanted pass through the end of the last block and the vocabulary matrix, by far the largest.
        """
        x = self.encode(input_ids, attention_mask, token_type_ids, wanted)  # [B, T, D] or [M, D]
        logits = self.mlm_head(x)  # [B, T, P] or [M, P]
        if labels is None:
            return logits[..., : self.config.vocab_size]
        logits, labels = logits.flatten(0, -2), labels.flatten()  # [M, P] and [M]; without `wanted` M is B * T
        # The softmax and its sum want fp32: of thousands of small numbers bf16, with 8 bits, would lose most.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss_sum = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        correct = None if self.training else (logits.argmax(dim=-1) == labels).sum()
        return MaskedOutput(loss_sum, correct)


class BertForSequenceClassification(BertEncoder):
    """One label for the whole input, read from its first token, [CLS], or from the mean over all its tokens."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.pooler = HeadTransform(config, activation=config.pooler, norm=config.pooler == "gelu")
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialize(self, config, generator)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """[B, T] -> logits [B, L]."""
        batch, length = input_ids.shape
        if self.config.pooling == "cls":
            first = torch.arange(batch, device=input_ids.device) * length
            x = self.encode(input_ids, attention_mask, token_type_ids, first)  # [B, D]
        else:
            x = mean_over_tokens(self.encode(input_ids, attention_mask, token_type_ids), attention_mask)  # [B, D]
        return self.classifier(self.dropout(self.pooler(x)))


def mean_over_tokens(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T, D] -> [B, D], padding left out; [CLS] and [SEP] count as tokens."""
    if attention_mask is None:
        return x.mean(dim=1)
    weights = attention_mask[..., None].to(x.dtype)  # [B, T, 1]
    return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Table(nn.Embedding):
    """Vectors by number, an embedding whose values are set later: by `initialize` or from a checkpoint."""

    def reset_parameters(self) -> None:
        """Spare torch's own random draw; on the meta device it would load torch's compiler first."""


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.bias)


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Give `module` fresh weights: a normal cut at two deviations (as in Devlin et al.'s code), zero biases."""
    done: set[Tensor] = set()  # a tied matrix comes twice, and is drawn once: as word embeddings
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        if isinstance(part, nn.Linear | MaskedLMHead) and part.bias is not None:
            part.bias.zero_()
        if not isinstance(part, nn.Linear | nn.Embedding) or part.weight in done:
            continue
        done.add(part.weight)
        deviation = config.initializer_range
        nn.init.trunc_normal_(part.weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx].zero_()


# Their rows are filled up to a multiple of 64, for faster products; files hold the vocabulary's alone.
VOCABULARY_MATRICES = ("embeddings.word_embeddings.weight", "mlm_head.decoder.weight")


class SummaryRow(NamedTuple):
    """One module with weights of its own."""

    path: str
    shape: str
    parameters: int


class ParameterCount(NamedTuple):
    """Weights, each counted once, without the rows that pad the vocabulary."""

    total: int
    without_embeddings: int


def summary(model: BertEncoder) -> list[SummaryRow]:
    """The anatomy, top to bottom: each module that holds weights, their shape, how many; shared ones count once."""
    rows: list[SummaryRow] = []
    owners: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        shapes, parameters = [], 0
        for name, parameter in module.named_parameters(recurse=False):
            shape = list(parameter.shape)
            if f"{path}.{name}" in VOCABULARY_MATRICES:
                shape[0] = model.config.vocab_size
            shared = f" = {owners[parameter]}" if parameter in owners else ""
            shapes.append(f"{name} {' x '.join(map(str, shape))}{shared}")
            parameters += 0 if shared else math.prod(shape)
            owners.setdefault(parameter, f"{path}.{name}")
        if shapes:
            rows.append(SummaryRow(path, ", ".join(shapes), parameters))
    return rows


def count_parameters(model: BertEncoder) -> ParameterCount:
    """All weights, and all but the embeddings (and with them a tied vocabulary matrix)."""
    rows = summary(model)
    total = sum(row.parameters for row in rows)
    return ParameterCount(total, total - sum(row.parameters for row in rows if row.path.endswith("_embeddings")))
