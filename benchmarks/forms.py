"""One classifier in four forms on the same batches: torch in fp32 and bf16, onnxruntime in fp32 and int8.

    python benchmarks/forms.py --cp RUN --data validation.parquet

Size of the weights, accuracy on the whole file, and sentences a second: the forms take turns, five rounds; median and
range. Batches of 32 sentences of similar length, all cores. Exports into a temporary folder by `bertling export`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bertling.checkpoint import load_checkpoint
from bertling.inference import Classifier
from bertling.labelled import load_labelled
from bertling.model import BertForSequenceClassification
from bertling.runtime import Runtime, available_cores
from bertling.tools.export import export

ROUNDS = 5
Form = Callable[[Tensor, Tensor | None], np.ndarray]


def torch_form(model: BertForSequenceClassification, dtype: torch.dtype) -> Form:
    """The model itself."""
    runtime = Runtime(torch.device("cpu"), dtype, compile=False)

    def scores(ids: Tensor, mask: Tensor | None) -> np.ndarray:
        with torch.inference_mode(), runtime.autocast():
            return model(ids, mask).float().numpy()

    return scores


def onnx_form(path: Path, threads: int) -> Form:
    """An exported file."""
    import onnxruntime  # not before the export, which turns off its telemetry

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def scores(ids: Tensor, mask: Tensor | None) -> np.ndarray:
        real = torch.ones_like(ids) if mask is None else mask.long()
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": real.numpy()})[0]

    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cp", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    threads = available_cores()
    torch.set_num_threads(threads)
    loaded = load_checkpoint(options.cp)
    model = loaded.model
    assert isinstance(model, BertForSequenceClassification), "not a classifier"
    texts = load_labelled(options.data)
    labels = np.array(texts.labels)
    reader = Classifier(model, loaded.tokenizer)
    rows = [ids[: reader.limit] for ids in reader.encode(texts.texts)]
    batches = list(reader.batches(rows))
    with tempfile.TemporaryDirectory() as folder:
        written = export(options.cp, Path(folder) / "onnx", "onnx", int8=True)
        fp32, int8 = (written.folder / name for name in ("model.onnx", "model_int8.onnx"))
        weights = sum(p.numel() for p in model.parameters()) * 4 / 1e6
        forms: dict[str, tuple[Form, float]] = {
            "torch fp32": (torch_form(model, torch.float32), weights),
            "torch bf16": (torch_form(model, torch.bfloat16), weights),
            "onnxruntime fp32": (onnx_form(fp32, threads), fp32.stat().st_size / 1e6),
            "onnxruntime int8": (onnx_form(int8, threads), int8.stat().st_size / 1e6),
        }
        right: dict[str, float] = {}
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(ROUNDS + 1):  # the first one warms up
            for name, (scores, _) in forms.items():
                started = time.perf_counter()
                answers = [(places, scores(ids, mask).argmax(-1)) for places, ids, mask in batches]
                if number:
                    seconds[name].append(time.perf_counter() - started)
                right[name] = float(np.mean(np.concatenate([labels[places] == best for places, best in answers])))
    print(f"{len(rows):,} sentences, {threads} threads, {ROUNDS} rounds")
    for name, (_, size) in forms.items():
        speed = sorted(len(rows) / one for one in seconds[name])
        print(
            f"{name:<17} {size:7.2f} MB  accuracy {right[name]:.4f}  {statistics.median(speed):8,.0f} sentences/s "
            f"({speed[0]:,.0f} to {speed[-1]:,.0f})"
        )


if __name__ == "__main__":
    main()
