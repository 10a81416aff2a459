"""Transformers' own classes, loaded from what we write."""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import Tensor, nn


def stock_model(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Load the files that we would write with transformers, which must find nothing to complain about."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    auto = {"ForMaskedLM": "AutoModelForMaskedLM", "ForSequenceClassification": "AutoModelForSequenceClassification"}
    kind = next(auto[ending] for ending in auto if config["architectures"][0].endswith(ending))
    model, loading = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__name__ == config["architectures"][0]
    assert isinstance(model, nn.Module)
    return model
