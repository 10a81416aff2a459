"""The anatomy of a model as a table: every module, the shape of its weights, how many they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bertling.checkpoint import load_checkpoint
from bertling.model import BertEncoder, BertForMaskedLM, ParameterCount, SummaryRow, count_parameters, summary
from bertling.presets import preset_config


@dataclass(frozen=True)
class Anatomy:
    """The rows of the table and their sum."""

    title: str
    rows: list[SummaryRow]
    count: ParameterCount

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"title": self.title, "modules": [row._asdict() for row in self.rows], **self.count._asdict()}

    def text(self) -> str:
        """The table, one module a line, by its full path."""
        left, middle = max(len(row.path) for row in self.rows), max(len(row.shape) for row in self.rows)
        lines = [self.title]
        lines += [f"{row.path:<{left}}  {row.shape:<{middle}}  {row.parameters:>13,}" for row in self.rows]
        lines.append(f"{'all':<{left}}  {'':<{middle}}  {self.count.total:>13,}")
        lines.append(f"{'without embeddings':<{left}}  {'':<{middle}}  {self.count.without_embeddings:>13,}")
        return "\n".join(lines)


def anatomy(cp: Path | None, preset: str, size: str, vocab_size: int) -> Anatomy:
    """The anatomy of a checkpoint, or of a preset in a size (which costs no memory: only shapes are made)."""
    if cp is not None:
        model = load_checkpoint(cp).model
        title = f"{cp}: {type(model).__name__}, {model.config.architecture}"
    else:
        config = preset_config(preset, size, vocab_size, max_position_embeddings=128, pad_token_id=0)
        with torch.device("meta"):
            model = BertForMaskedLM(config)
        title = f"{preset} {size}, vocabulary of {vocab_size:,}: {type(model).__name__}"
    assert isinstance(model, BertEncoder)
    return Anatomy(title, summary(model), count_parameters(model))
