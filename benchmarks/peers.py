"""What else users do, side by side with the usual tools: preparing text, fine-tuning, classifying, starting up.

    pip install datasets accelerate
    python benchmarks/peers.py prepare  --input TEXT --vocab VOCAB
    python benchmarks/peers.py classify --cp RUN --data validation.parquet
    python benchmarks/peers.py finetune --data train.parquet --vocab VOCAB
    python benchmarks/peers.py startup

In each round both sides run once, one after the other, with nothing else on the machine; printed are the medians, their
ratio, and its range over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))


def side_by_side(what: str, unit: str, amount: float, sides: dict[str, Callable[[], float]], rounds: int) -> None:
    """Let every side run once a round (each returns its seconds), and print speeds and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(run())
    ours, *others = sides
    print(what)
    for name, values in seconds.items():
        print(f"  {name:<32} {amount / statistics.median(values):12,.1f} {unit}/s  ({statistics.median(values):.2f} s)")
    for name in others:
        ratios = sorted(theirs / mine for mine, theirs in zip(seconds[ours], seconds[name], strict=True))
        print(f"  {statistics.median(ratios):.2f} times as fast as {name} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def timed(command: list[str]) -> float:
    """Seconds of a whole process."""
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stderr)
    return time.perf_counter() - started


PREPARE_PEER = """
import json, sys
from datasets import load_dataset
from transformers import BertTokenizerFast
source, vocab, folder, processes = sys.argv[1:]
tokenizer = BertTokenizerFast(vocab_file=vocab)
data = load_dataset("text", data_files=source, split="train", cache_dir=folder)
def tokenize(batch):
    return tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
def group(batch):
    ids = [i for row in batch["input_ids"] for i in row]
    size = 126
    return {"input_ids": [[tokenizer.cls_token_id, *ids[i : i + size], tokenizer.sep_token_id]
                          for i in range(0, len(ids) - size + 1, size)]}
data = data.map(tokenize, batched=True, num_proc=int(processes), remove_columns=["text"])
data = data.map(group, batched=True, num_proc=int(processes), remove_columns=data.column_names)
print(json.dumps({"rows": len(data)}))
"""


def prepare(options: argparse.Namespace) -> None:
    """Text to rows of 128 ids: `bertling prepare` against datasets.map with the fast tokenizer, as in run_mlm.py."""
    size = options.input.stat().st_size / 1e6

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = ["prepare", "-i", options.input, "-l", "x", "-o", folder, "-m", "128", "-v", options.vocab]
            return timed([sys.executable, "-m", "bertling", *map(str, words), "--workers", str(CORES)])

    def peer() -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [options.input, options.vocab / "vocab.txt", folder, CORES]
            return timed([sys.executable, "-c", PREPARE_PEER, *map(str, words)])

    sides = {"bertling prepare": ours, "datasets.map + fast tokenizer": peer}
    side_by_side(f"prepare, {size:.1f} MB of text, {CORES} processes", "MB", size, sides, options.rounds)


def classify(options: argparse.Namespace) -> None:
    """Classes of a file of sentences: our Classifier against the pipeline, with sorted texts and its best batch."""
    import torch
    import transformers

    import bertling
    from bertling.labelled import load_labelled
    from bertling.runtime import build_runtime
    from bertling.settings import parse_settings
    from bertling.tools.export import export

    texts = load_labelled(options.data).texts
    model = bertling.load(options.cp, build_runtime(parse_settings({"device": "cpu", "compile": "false"})))
    with tempfile.TemporaryDirectory() as folder:
        export(options.cp, Path(folder) / "model", "hf")
        pipes = {
            dtype: transformers.pipeline(
                "text-classification", model=str(Path(folder) / "model"), dtype=dtype, device="cpu"
            )
            for dtype in (torch.float32, torch.bfloat16)
        }

    def run(function: Callable[[], Any]) -> Callable[[], float]:
        def timed_run() -> float:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started

        return timed_run

    by_length = sorted(texts, key=len)
    tries = {
        (dtype, size): run(lambda pipe=pipe, size=size: pipe(by_length, batch_size=size))()
        for dtype, pipe in pipes.items()
        for size in (1, 8, 32, 128)
    }
    dtype, size = min(tries, key=tries.__getitem__)
    model.classify(texts)
    sides = {
        "bertling": run(lambda: model.classify(texts)),
        f"pipeline, {str(dtype)[6:]}, batch {size}, sorted": run(lambda: pipes[dtype](by_length, batch_size=size)),
        "pipeline at its defaults": run(lambda: pipes[torch.float32](texts)),
    }
    side_by_side(f"classify, {len(texts):,} sentences", "sentences", len(texts), sides, options.rounds)


FINETUNE_PEER = """
import json, sys, time
import torch, transformers
from datasets import load_dataset
source, vocab, steps, batch, folder, best = sys.argv[1:]
steps, batch, best = int(steps), int(batch), best == "best"
tokenizer = transformers.BertTokenizerFast(vocab_file=vocab)
data = load_dataset("parquet", data_files=source, split="train", cache_dir=folder)
data = data.map(lambda b: tokenizer(b["sentence"], truncation=True, max_length=128), batched=True)
config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=768, num_hidden_layers=6,
                                 num_attention_heads=12, intermediate_size=3072, num_labels=2)
model = transformers.BertForSequenceClassification(config)
more = dict(bf16=True, train_sampling_strategy="group_by_length", optim="adamw_torch_fused") if best else {}
class Clock(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        self.times = getattr(self, "times", []) + [time.perf_counter()]
clock = Clock()
args = transformers.TrainingArguments(folder, per_device_train_batch_size=batch, max_steps=steps, report_to=[],
                                      save_strategy="no", use_cpu=True, disable_tqdm=True, **more)
transformers.Trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]).train()
warm = 10
print(json.dumps({"seconds": clock.times[-1] - clock.times[warm - 1], "steps": steps - warm}))
"""

FINETUNE_OURS = """
import json, sys, time
from pathlib import Path
import torch
from bertling.cli import cli
from bertling.train import Trainer
source, vocab, steps, batch, folder, _ = sys.argv[1:]
times = []
step = Trainer.train_step
def watched(self, progress):
    loss = step(self, progress)
    times.append(time.perf_counter())
    return loss
Trainer.train_step = watched
cli.main(["finetune", "--from-scratch", "--preset", "bert", "--size", "base", "--n-layers", "6", "--vocab", vocab,
          "--train-input", source, "--val-input", source + ".dev.parquet", "--base-dir", folder, "--max-iters", steps,
          "--batch-size", batch, "--val-interval", "1000000"], standalone_mode=False)
warm = 10
print(json.dumps({"seconds": times[-1] - times[warm - 1], "steps": int(steps) - warm}))
"""


def finetune(options: argparse.Namespace) -> None:
    """Sentences a second in 50 steps of an epoch of SST-2, after 10 to warm up, BERT 6 x 768: ours against the Trainer.

    Both sort the texts of 50 batches by length, the Trainer from long to short: fewer steps would show it only some.
    """
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "train.parquet"
        table = pq.read_table(options.data)
        pq.write_table(table, source)
        pq.write_table(table.slice(0, 64), f"{source}.dev.parquet")

        def side(code: str, how: str) -> Callable[[], float]:
            def run() -> float:
                with tempfile.TemporaryDirectory() as folder:
                    words = [source, options.vocab / "vocab.txt", options.steps, options.batch_size, folder, how]
                    command = [sys.executable, "-c", code, *map(str, words)]
                    ended = subprocess.run(command, capture_output=True, text=True)
                    if ended.returncode:
                        sys.exit(ended.stderr)
                    told = json.loads(ended.stdout.splitlines()[-1])
                    return float(told["seconds"] / told["steps"])

            return run

        sides = {
            "bertling finetune": side(FINETUNE_OURS, ""),
            "Trainer, bf16, by length, fused": side(FINETUNE_PEER, "best"),
            "Trainer at its defaults": side(FINETUNE_PEER, "plain"),
        }
        what = f"finetune, BERT 6 x 768, batches of {options.batch_size}, {options.steps} steps"
        side_by_side(what, "sentences", options.batch_size, sides, options.rounds)


def startup(options: argparse.Namespace) -> None:
    """The command line until it answers --help."""
    command = [str(Path(sys.executable).with_name("bertling")), "--help"]
    timed(command)
    values = sorted(timed(command) for _ in range(10))
    print(f"bertling --help: {statistics.median(values):.3f} s ({values[0]:.3f} to {values[-1]:.3f}, 10 times)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "classify", "finetune", "startup"])
    parser.add_argument("--input", type=Path)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--cp", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    {"prepare": prepare, "classify": classify, "finetune": finetune, "startup": startup}[options.what](options)


if __name__ == "__main__":
    main()
