"""The same mathematics as transformers' own classes, on random shapes: forward, backward, and steps of training.

`pytest tests/test_parity.py -s` tells the worst difference of each comparison: docs/parity.md has them.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stock_models import stock_model
from torch import Tensor, nn

from bertling.interop import BUILDERS, hf_keys, to_hf
from bertling.model import VOCABULARY_MATRICES, BertEncoder, BertForMaskedLM, ModelConfig
from bertling.presets import preset_config
from bertling.stock import Head

STOCK = ("bert", "distilbert", "modern")
HEADS: tuple[Head, ...] = ("masked_lm", "classification")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
ROUNDED_ROTATION = 1e-6
"""The stock ModernBERT rotates in fp32 whatever its weights are in."""


def random_config(name: str, seed: int) -> ModelConfig:
    draw = random.Random(f"{name} {seed}")
    heads = draw.randint(1, 4)
    config = preset_config(
        name,
        "mini",
        draw.randint(30, 100),
        max_position_embeddings=draw.randint(9, 24),
        pad_token_id=draw.randrange(5),
        hidden_size=heads * 2 * draw.randint(2, 8),
        num_hidden_layers=draw.randint(1, 5),
        num_attention_heads=heads,
        dropout=0.0,
        labels=tuple("abcde"[: draw.randint(2, 5)]),
    )
    config = replace(config, intermediate_size=draw.randint(5, 50))
    if name == "bert":
        return replace(config, type_vocab_size=draw.randint(1, 3))
    if name == "modern":
        return replace(
            config,
            global_attn_every_n_layers=draw.randint(1, 3),
            local_attention=draw.randint(2, 9),
            rope_theta=draw.uniform(100, 100_000),
            local_rope_theta=draw.uniform(100, 100_000),
            pooling=draw.choice(["cls", "mean"]),
        )
    return config


def random_model(name: str, head: Head, seed: int) -> BertEncoder:
    """Every weight has a random share, so that no part is silent (zero) or neutral (one)."""
    model = BUILDERS[head](random_config(name, seed), torch.Generator().manual_seed(seed + 10))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


class Inputs:
    """A padded batch with segments, and what is asked about it."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, length = 5, config.max_position_embeddings
        self.mask = (torch.arange(length) < torch.tensor([length, length // 2, 5, 3, 1])[:, None]).long()
        ids = torch.randint(5, config.vocab_size, (rows, length), generator=generator)
        self.ids = torch.where(self.mask.bool(), ids, config.pad_token_id)
        self.segments = None
        if config.type_vocab_size:
            self.segments = torch.randint(config.type_vocab_size, (rows, length), generator=generator)
        asked = (torch.rand(rows, length, generator=generator) < 0.4) & self.mask.bool()
        asked[0, 0] = True
        self.wanted = asked.flatten().nonzero().squeeze(1)
        self.answers = self.ids.flatten()[self.wanted]
        self.labels = torch.arange(rows) % config.num_labels

    def stock(self) -> dict[str, Tensor]:
        extra = {} if self.segments is None else {"token_type_ids": self.segments}
        return {"input_ids": self.ids, "attention_mask": self.mask, **extra}


def our_loss(model: BertEncoder, inputs: Inputs) -> Tensor:
    if isinstance(model, BertForMaskedLM):
        loss: Tensor = model(
            inputs.ids, inputs.mask, inputs.segments, wanted=inputs.wanted, labels=inputs.answers
        ).loss_sum
        return loss / len(inputs.wanted)
    return F.cross_entropy(model(inputs.ids, inputs.mask, inputs.segments), inputs.labels)


def stock_loss(model: BertEncoder, logits: Tensor, inputs: Inputs) -> Tensor:
    """From the logits: the stock class itself would round them to fp32 first."""
    if isinstance(model, BertForMaskedLM):
        return F.cross_entropy(logits.flatten(0, 1)[inputs.wanted], inputs.answers)
    return F.cross_entropy(logits, inputs.labels)


def under_stock_names(model: BertEncoder, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """A value of each parameter (itself, or its gradient), cut and named as the stock class has it."""
    named = {}
    for name, parameter in model.named_parameters():
        keys, tensor = hf_keys(model.config.architecture, name), value(parameter)
        assert tensor is not None, name
        rows = tensor[: model.config.vocab_size] if name in VOCABULARY_MATRICES else tensor
        named.update(zip(keys, rows.chunk(len(keys)), strict=True))
    return named


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference, as a share of the largest value of its tensor."""
    with torch.no_grad():
        return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-2)) for ours, theirs in pairs)


def rotate_in_fp64(monkeypatch: pytest.MonkeyPatch, stock: nn.Module) -> None:
    """Give the stock ModernBERT angles and a rotation in fp64."""
    from transformers.models.modernbert import modeling_modernbert as module

    def angles(self: Any, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        base = self.config.rope_parameters[layer_type]["rope_theta"]
        width = self.config.hidden_size // self.config.num_attention_heads
        frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        turned = position_ids[..., None].double() * frequencies
        both = torch.cat((turned, turned), dim=-1)
        return both.cos(), both.sin()

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + module.rotate_half(q) * sin, k * cos + module.rotate_half(k) * sin

    monkeypatch.setattr(module.ModernBertRotaryEmbedding, "forward", angles)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", rotation)
    for part in stock.modules():
        if "apply_rotary_pos_emb" in vars(part) or hasattr(part, "rotary_fn"):
            monkeypatch.setattr(part, "rotary_fn" if hasattr(part, "rotary_fn") else "apply_rotary_pos_emb", rotation)


def tell(what: str, tolerance: float, differences: dict[str, float]) -> None:
    """Print the differences, and let none exceed the tolerance."""
    print(f"\nparity: {what}: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    for name, value in differences.items():
        assert value <= tolerance, name


def compare(model: BertEncoder, stock: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Hidden states, logits, loss and the gradient of every weight."""
    real = inputs.mask.bool()
    theirs = stock(**inputs.stock(), output_hidden_states=True)
    if isinstance(model, BertForMaskedLM):
        ours = model(inputs.ids, inputs.mask, token_type_ids=inputs.segments)
        logits = (ours[real], theirs.logits[real])
    else:
        logits = (model(inputs.ids, inputs.mask, inputs.segments), theirs.logits)
    hidden = model.encode(inputs.ids, inputs.mask, inputs.segments)
    loss, their_loss = our_loss(model, inputs), stock_loss(model, theirs.logits, inputs)
    loss.backward()
    their_loss.backward()
    gradients = under_stock_names(model, lambda parameter: parameter.grad)
    their_gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    return {
        "hidden states": worst([(hidden[real], theirs.hidden_states[-1][real])]),
        "logits": worst([logits]),
        "loss": worst([(loss, their_loss)]),
        "gradients": worst([(gradients[name], grad) for name, grad in their_gradients.items() if grad is not None]),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", STOCK)
def test_forward_and_backward(name: str, head: Head, dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    """Ours in either format, the stock class in fp64: in fp32 its own rounding may be the larger, by machine."""
    model = random_model(name, head, seed)
    stock = stock_model(tmp_path, *to_hf(model)).double().train()
    model.to(dtype)
    tolerance = ROUNDED_ROTATION if name == "modern" and dtype is torch.float64 else TOLERANCE[dtype]
    differences = compare(model, stock, Inputs(model.config, seed))
    tell(f"{name}, {head}, {str(dtype).removeprefix('torch.')}, shape {seed}", tolerance, differences)


@pytest.mark.parametrize("head", HEADS)
def test_modern_where_the_stock_class_rotates_in_fp64(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("modern", head, 1)
    stock = stock_model(tmp_path, *to_hf(model)).double().train()
    rotate_in_fp64(monkeypatch, stock)
    differences = compare(model.double(), stock, Inputs(model.config, 1))
    tell(f"modern, {head}, float64, rotation in float64", TOLERANCE[torch.float64], differences)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", STOCK)
def test_steps_of_training_stay_together(
    name: str, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(name, head, 7)
    stock = stock_model(tmp_path, *to_hf(model)).double().train()
    model.double()
    if name == "modern":
        rotate_in_fp64(monkeypatch, stock)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-3)
    theirs = torch.optim.AdamW(stock.parameters(), lr=1e-3)
    before = {key: value.clone() for key, value in under_stock_names(model, lambda p: p.detach()).items()}
    for step in range(5):
        inputs = Inputs(model.config, step)
        for optimizer, loss in (
            (ours, our_loss(model, inputs)),
            (theirs, stock_loss(model, stock(**inputs.stock()).logits, inputs)),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after, stock_after = under_stock_names(model, lambda p: p.detach()), dict(stock.named_parameters())
    still = [key for key in stock_after if (after[key] - before[key]).abs().max() < 1e-4]
    assert all(key.endswith(("key.bias", "k_lin.bias")) for key in still)  # shifts all scores of a query alike
    difference = worst([(after[key], parameter.detach()) for key, parameter in stock_after.items()])
    tell(f"{name}, {head}, float64, after 5 steps of AdamW", TOLERANCE[torch.float64], {"weights": difference})
