"""A trained model as a folder for others: Hugging Face's form with a model card, or ONNX; checked before it is done."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertling.checkpoint import Loaded, load_checkpoint, write_model
from bertling.files import BertlingError, atomic_folder, atomic_write, refuse_file
from bertling.interop import head_of
from bertling.labelled import pad_rows
from bertling.model import BertEncoder
from bertling.stock import Head
from bertling.tools.modelcard import model_card

SENTENCES = (
    "the little [MASK] sat by the window and watched the rain .",
    "good",
    "nothing in this long and tired film is worth the two hours that it takes , and its ending least of all .",
    "Zürich, 1914: the harbour [MASK] 3.5 kilometres away -- and nobody knew why!",
    "she opened the door . [MASK] was there .",
    "日本 and naïve café",
    "a warm , funny and clever story about people who lose everything but their [MASK] of humour , told without haste "
    "by a director who trusts those who watch",
    "",
)
"""What a copy is compared with its original on: short and long, masked or not, in more than one script."""
TOLERANCE = 1e-4
"""Largest difference allowed in fp32, as a share of the largest score."""
WRITTEN = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"}
WRITTEN |= {"model.onnx", "model_int8.onnx"}
AUTO: dict[Head, str] = {
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "none": "AutoModel",
}
OUTPUTS: dict[Head, str] = {"masked_lm": "logits", "classification": "logits", "none": "last_hidden_state"}


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the original."""

    folder: Path
    files: dict[str, int]
    """Sizes in bytes."""
    worst: dict[str, float]
    """For each form of the model, the largest difference seen on the sentences, as a share of the largest score."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"folder": str(self.folder), "files": self.files, "worst_difference": self.worst}

    def text(self) -> str:
        """A line a file, and the check."""
        lines = [f"{self.folder / name}: {size / 1e6:,.2f} MB" for name, size in self.files.items()]
        for name, worst in self.worst.items():
            lines.append(f"{name}: within {worst:.1e} of the original on {len(SENTENCES)} sentences")
        return "\n".join(lines)


def export(cp: Path, output: Path, form: str, *, int8: bool = False, force: bool = False) -> Export:
    """Write the model as `form` (hf or onnx) into a new folder, which exists only once it has been checked."""
    if int8 and form != "onnx":
        raise BertlingError("--int8: only the onnx form has it; give --format onnx, or leave --int8 out")
    loaded = load_checkpoint(cp)
    if loaded.model.config.architecture == "seed" and form == "hf":
        raise BertlingError(
            f"{cp}: the preset seed has no stock class in transformers, so this form would load nowhere; its "
            "checkpoint folders are what it has, and --format onnx works"
        )
    check_output(output, cp)
    loaded.model.eval()
    need("transformers" if form == "hf" else "onnx")
    with atomic_folder(output, force=force) as folder:
        write_model(folder, loaded.model, loaded.tokenizer)
        if form == "hf":
            worst = {"stock class": compare_stock(folder, loaded)}
        else:
            worst = write_onnx(folder, loaded, int8=int8)
            (folder / "model.safetensors").unlink()
        atomic_write(folder / "README.md", model_card(loaded, form, worst))
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Export(output, files, worst)


def check_output(output: Path, cp: Path) -> None:
    """Refuse a file, the model's own folder, and one with anything that no export writes: it is replaced whole."""
    refuse_file(output, "the model")
    place, source = output.resolve(), cp.resolve()
    if place == source or place in source.parents:
        raise BertlingError(f"{output}: the model to export lies there; choose another folder")
    others = sorted(path.name for path in output.iterdir() if path.name not in WRITTEN) if output.is_dir() else []
    if others:
        raise BertlingError(f"{output}: holds {others[0]}, which no export wrote; choose another folder")


def need(*modules: str) -> None:
    """Say in one line what to install."""
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            raise BertlingError(
                f"export needs {module}, which is not installed: pip install 'bertling[export]'"
            ) from None


def batch_of(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """The sentences as input_ids and attention_mask [B, T], padded on the right."""
    tokenizer, longest = loaded.tokenizer, loaded.model.config.max_position_embeddings
    rows = [[tokenizer.cls_id, *ids[: longest - 2], tokenizer.sep_id] for ids in tokenizer.encode_batch(SENTENCES)]
    input_ids, mask = pad_rows(rows, tokenizer.pad_id)
    return input_ids, torch.ones_like(input_ids) if mask is None else mask.long()


def ours_on(model: BertEncoder, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Our scores (or hidden states) on a batch."""
    with torch.inference_mode():
        scores: Tensor = Scores(model)(input_ids, mask)
    return scores


def difference(ours: Tensor, theirs: Tensor, mask: Tensor) -> float:
    """The largest difference where tokens count, as a share of our largest value."""
    if ours.ndim == 3:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    worst = float((ours - theirs).abs().max() / ours.abs().max())
    return worst if worst == worst else float("inf")


def refuse(name: str, worst: float) -> float:
    """Let only an equal copy pass."""
    if worst > TOLERANCE:
        raise BertlingError(
            f"{name} differs from the original by {worst:.1e} of the largest score (at most {TOLERANCE:.0e} is "
            "rounding), so nothing was written; please report this with the checkpoint's config.json"
        )
    return worst


def compare_stock(folder: Path, loaded: Loaded) -> float:
    """Load the folder as any user would, with the stock classes, and compare ids and scores with ours."""
    import transformers

    head = head_of(loaded.model)
    with quiet():
        stock = getattr(transformers, AUTO[head]).from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    input_ids, mask = batch_of(loaded)
    length = input_ids.shape[1]
    theirs = tokenizer(list(SENTENCES), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    if not torch.equal(theirs["input_ids"], input_ids):
        raise BertlingError("the stock tokenizer gives other ids than ours, so nothing was written; please report this")
    with torch.inference_mode():
        scores = stock(input_ids=input_ids, attention_mask=mask)[OUTPUTS[head]]
    return refuse("the stock class", difference(ours_on(loaded.model, input_ids, mask), scores, mask))


class Scores(nn.Module):
    """A model as a function of ids and mask alone: logits, or last hidden states of an encoder without a head."""

    def __init__(self, model: BertEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] each -> [B, T, V], [B, L] or [B, T, D]."""
        if head_of(self.model) == "none":
            return self.model.encode(input_ids, attention_mask)
        scores: Tensor = self.model(input_ids, attention_mask)
        return scores


def write_onnx(folder: Path, loaded: Loaded, *, int8: bool) -> dict[str, float]:
    """Write model.onnx (and model_int8.onnx); batch and length are free. Compares both with the original."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is loaded, or tells its maker
    need("onnxscript", "onnxruntime")
    name = OUTPUTS[head_of(loaded.model)]
    input_ids, mask = batch_of(loaded)
    longest = loaded.model.config.max_position_embeddings
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    with quiet():
        torch.onnx.export(
            Scores(loaded.model),
            (input_ids, mask),
            str(folder / "model.onnx"),
            input_names=["input_ids", "attention_mask"],
            output_names=[name],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
            dynamo=True,
            external_data=False,
        )
    worst = {"model.onnx": refuse("model.onnx", compare_onnx(folder / "model.onnx", loaded))}
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with quiet():
            quantize_dynamic(folder / "model.onnx", folder / "model_int8.onnx", weight_type=QuantType.QInt8)
        # Eight bits are meant to differ: how far is told, and what it costs in accuracy is docs/parity.md's business.
        worst["model_int8.onnx"] = compare_onnx(folder / "model_int8.onnx", loaded)
    return worst


def compare_onnx(path: Path, loaded: Loaded) -> float:
    """The largest difference on the batch of sentences, and on each alone, at its own length."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    input_ids, mask = batch_of(loaded)
    worst = []
    for rows in (slice(None), *(slice(i, i + 1) for i in range(len(input_ids)))):
        length = int(mask[rows].sum(dim=1).max())
        ids, real = input_ids[rows, :length], mask[rows, :length]
        (theirs,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": real.numpy()})
        worst.append(difference(ours_on(loaded.model, ids, real), torch.from_numpy(np.asarray(theirs)), real))
    return max(worst)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what other libraries have to say about their own inner life off the screen."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
