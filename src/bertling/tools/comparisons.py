"""What users do besides training steps, timed by itself or beside the usual tools: preparing text, drawing batches,
fine-tuning, classifying, starting up. In each round all sides run once, one after the other."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bertling.files import BertlingError
from bertling.labelled import check_training, load_labelled
from bertling.progress import clock
from bertling.tools.programs import WARM_UP

Say = Callable[[str], None]
Sides = dict[str, Callable[[], float]]
"""What runs for each side; each run returns its seconds. Ours comes first."""
VOCAB_SIZE = 30_522
"""Entries to which the vocabulary of the box is filled up where none is named: BERT's own number."""
ASSETS = Path(__file__).parent.parent / "assets"
TEXT_BYTES = 5_000_000
TEXT_COPIES = 8
"""Without a text: this machine's documentation prose, so many times, since starting up shall not be what is timed."""


def round_by_round(seconds: Mapping[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """How many times as fast as each other side the first one is: median, lowest and highest over the rounds."""
    ours, *others = seconds
    result = {}
    for other in others:
        each = sorted(theirs / mine for mine, theirs in zip(seconds[ours], seconds[other], strict=True))
        result[other] = (statistics.median(each), each[0], each[-1])
    return result


def ratio_lines(ratios: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """A line for each side that we are compared with."""
    return [
        f"  {middle:.2f} times as fast as {name} ({low:.2f} to {high:.2f} over the rounds)"
        for name, (middle, low, high) in ratios.items()
    ]


@dataclass(frozen=True)
class Comparison:
    """One kind of work, and how long each side took over it."""

    what: str
    unit: str
    amount: float
    """Units in a run."""
    seconds: dict[str, list[float]]
    """Of each side, in each round; ours comes first."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**vars(self), "ratios": round_by_round(self.seconds)}

    def text(self) -> str:
        """A few lines."""
        lines = [self.what]
        for name, values in self.seconds.items():
            middle = statistics.median(values)
            speed = f"{self.amount / middle:>12,.1f} {self.unit}/s" if self.unit else ""
            lines.append(f"  {name:<40}{speed}  ({middle:.3g} s, {min(values):.3g} to {max(values):.3g})")
        return "\n".join(lines + ratio_lines(round_by_round(self.seconds)))


@dataclass(frozen=True)
class Bench:
    """What is common to all comparisons: the material, where it lies, and how often it is gone over."""

    folder: Path
    """For what is made on the way; thrown away by the caller."""
    against: bool
    rounds: int
    device: str
    cores: int
    say: Say
    text: Path | None = None
    vocab: Path | None = None
    data: Path | None = None
    dtype: str = "auto"
    """Of ours."""

    def run(self, what: str, unit: str, amount: float, sides: Sides, others: Sides) -> Comparison:
        """Let all sides run once a round."""
        sides = {**sides, **(others if self.against else {})}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        began = time.monotonic()
        for number in range(self.rounds):
            left = (time.monotonic() - began) / number * (self.rounds - number) if number else None
            self.say(
                f"{what}: round {number + 1} of {self.rounds}" + ("" if left is None else f", about {clock(left)} left")
            )
            for name, run in sides.items():
                seconds[name].append(run())
        return Comparison(what, unit, amount, seconds)

    def vocabulary(self) -> Path:
        """The folder of the vocabulary named, or of the box's with unused entries added."""
        from bertling.inference import BOX
        from bertling.tokenizer import Tokenizer

        target = self.folder / "vocab"
        if not target.exists():
            tokenizer = Tokenizer.load(self.vocab or BOX)
            if self.vocab is None:
                unused = (f"[unused{number}]" for number in range(VOCAB_SIZE - tokenizer.vocab_size))
                tokenizer = Tokenizer([*tokenizer.entries, *unused])
            target.mkdir()
            tokenizer.save(target)
        return target

    def prepare(self) -> Comparison:
        """A text file to rows of 128 ids: `bertling prepare` against `datasets.map`, all processes of the machine."""
        text, vocab = self.text, self.vocabulary()
        if text is None:
            from bertling.tools.quickstart_text import collect_english

            text = self.folder / "prose.txt"
            text.write_text("\n\n".join(collect_english(TEXT_BYTES) * TEXT_COPIES), encoding="utf-8")
        elif text.suffix != ".txt":
            raise BertlingError(f"{text}: the benchmark reads plain text, named .txt; unpack it")
        size = text.stat().st_size / 1e6

        def ours() -> float:
            with tempfile.TemporaryDirectory(dir=self.folder) as output:
                words = ["prepare", "-i", text, "-l", "x", "-o", output, "-m", "128", "-v", vocab]
                return timed([sys.executable, "-m", "bertling", *map(str, words), "--workers", str(self.cores)])

        def theirs() -> float:
            with tempfile.TemporaryDirectory(dir=self.folder) as output:
                given = {"text": text, "vocab": vocab, "folder": output}
                return timed(program("prepare", given, length=128, processes=self.cores))

        what = f"prepare {size:,.1f} MB of text, {self.cores} processes"
        return self.run(what, "MB", size, {"bertling prepare": ours}, {"datasets.map + BertTokenizerFast": theirs})

    def batches(self, rows: int = 64, steps: int = 200) -> Comparison:
        """Masked batches of prepared rows: ours against a DataLoader with transformers' collator."""
        import numpy as np

        from bertling.samples import open_samples
        from bertling.tools.contestants import Workload, made_up_text

        folder = self.folder / "rows"
        folder.mkdir()
        data, tokenizer = made_up_text(folder, Workload("bert", 1, 64, 1, VOCAB_SIZE, rows, 128))
        tokenizer.save(folder)
        samples = open_samples(data)
        np.save(folder / "rows.npy", samples.fetch(np.arange(samples.rows)))

        def ours() -> float:
            return told(program("batches_ours", {"data": data, "vocab": folder}, steps=steps, batch=rows))

        def theirs(workers: int) -> Callable[[], float]:
            given = {"vocab": folder, "rows": folder / "rows.npy"}
            return lambda: told(program("batches_theirs", given, steps=steps, batch=rows, workers=workers))

        return self.run(
            f"masked batches of {rows} x 128 tokens",
            "tokens",
            steps * rows * 128,
            {"bertling": ours},
            {f"DataLoader, {workers} workers": theirs(workers) for workers in (0, self.cores)},
        )

    def finetune(self, batch: int = 32, steps: int = 50, blocks: int = 6) -> Comparison:
        """Steps of an epoch of BERT, 768 wide, against the Trainer, each side sorting by length in its own way.

        Both sort the texts of 50 batches together, the Trainer from long to short: fewer steps would show it only some.
        """
        vocab, data = self.vocabulary(), self.folder / "labelled.parquet"
        self.write_labelled(data, rows=(WARM_UP + steps) * batch)
        shape = {"steps": steps, "batch": batch, "blocks": blocks}

        def side(name: str, **more: Any) -> Callable[[], float]:
            def run() -> float:
                with tempfile.TemporaryDirectory(dir=self.folder) as output:
                    given = {"data": data, "vocab": vocab, "folder": output}
                    return told(program(name, given, **shape, device=self.device, **more))

            return run

        return self.run(
            f"fine-tune BERT {blocks} x 768, batches of {batch}, {steps} steps",
            "sentences",
            steps * batch,
            {f"bertling finetune, {self.dtype}": side("finetune_ours", dtype=self.dtype)},
            {
                "Trainer, its faster format, by length, fused AdamW": side("finetune_theirs", best=True),
                "Trainer at its defaults": side("finetune_theirs", best=False),
            },
        )

    def write_labelled(self, path: Path, rows: int) -> None:
        """The labelled texts, over and over until there are enough rows, and a few to evaluate on beside them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        given = load_labelled(self.data or ASSETS / "sentiment_train.tsv")
        labels = check_training(given)
        places = [number % len(given.texts) for number in range(max(rows, len(given.texts)))]
        for target, some in ((path, places), (Path(f"{path}.dev.parquet"), places[:64])):
            columns = {"sentence": [given.texts[place] for place in some], "label": labels[some]}
            pq.write_table(pa.table(columns), target)

    def classify(self) -> Comparison:
        """Classes of sentences by a fresh BERT 6 x 768 against the pipeline, at the best of its settings.

        Where ours rounds to int8, the pipeline may as well, by torch's dynamic quantization.
        """
        import torch

        import bertling
        from bertling.checkpoint import write_model
        from bertling.model import BertForSequenceClassification
        from bertling.presets import preset_config
        from bertling.runtime import build_runtime
        from bertling.settings import parse_settings
        from bertling.tokenizer import Tokenizer

        texts = load_labelled(self.data or ASSETS / "sentiment_dev.tsv").texts
        tokenizer = Tokenizer.load(self.vocabulary())
        config = preset_config(
            "bert", "base", tokenizer.vocab_size, num_hidden_layers=6, max_position_embeddings=128,
            pad_token_id=tokenizer.pad_id, labels=("negative", "positive"),
        )  # fmt: skip
        folder = self.folder / "model"
        folder.mkdir()
        write_model(folder, BertForSequenceClassification(config), tokenizer)
        settings = parse_settings({"device": self.device, "dtype": self.dtype, "compile": "false"})
        ours = bertling.load(folder, build_runtime(settings))

        def timer(function: Callable[..., Any], *given: Any, **more: Any) -> Callable[[], float]:
            def run() -> float:
                started = time.perf_counter()
                function(*given, **more)
                return time.perf_counter() - started

            return run

        others: Sides = {}
        if self.against:
            import transformers

            self.say("classify: looking for the pipeline's best batch size and number format")
            by_length = sorted(texts, key=len)

            def pipeline(dtype: torch.dtype) -> Any:
                return transformers.pipeline("text-classification", str(folder), dtype=dtype, device=self.device)

            pipes = {"fp32": pipeline(torch.float32), "bf16": pipeline(torch.bfloat16)}
            if self.dtype == "int8" and self.device == "cpu":
                rounded = pipes["int8"] = pipeline(torch.float32)
                round_all: Callable[..., Any] = torch.ao.quantization.quantize_dynamic
                rounded.model = round_all(rounded.model, {torch.nn.Linear})
            tries = {
                f"pipeline, {form}, batches of {size}, sorted": timer(pipe, by_length, batch_size=size, truncation=True)
                for form, pipe in pipes.items()
                for size in (1, 8, 32, 128)
            }
            best = min(tries, key=lambda name: tries[name]())
            others = {
                best: tries[best],
                "pipeline at its defaults": timer(pipes["fp32"], texts, truncation=True),
            }
        ours.classify(texts)
        sides = {f"bertling classify, {self.dtype}": timer(ours.classify, texts)}
        return self.run(f"classify {len(texts):,} texts, BERT 6 x 768", "sentences", len(texts), sides, others)

    def startup(self) -> Comparison:
        """The command line until it answers --help."""
        command = [sys.executable, "-m", "bertling", "--help"]
        return self.run("start up", "", 1, {"bertling --help": lambda: timed(command)}, {})


COMPARISONS: dict[str, Callable[[Bench], Comparison]] = {
    one.__name__: one for one in (Bench.prepare, Bench.batches, Bench.finetune, Bench.classify, Bench.startup)
}


def compare(names: Sequence[str], bench: Bench) -> Iterator[Comparison]:
    """The comparisons asked for, made one by one. Raises BertlingError at once where something for them is missing."""
    for path in (bench.text, bench.vocab, bench.data):
        if path is not None and not path.exists():
            raise BertlingError(f"{path}: not found; name a file that is there")
    if bench.against and set(names) - {"startup"}:
        for module in ("accelerate", "datasets", "transformers"):
            if find_spec(module) is None:
                raise BertlingError(
                    f"--against hf needs {module}, which is not installed: pip install 'bertling[bench]'"
                )
    return (COMPARISONS[name](bench) for name in names)


def program(name: str, paths: Mapping[str, Any], **more: Any) -> list[str]:
    """The command that runs one of programs.py."""
    given = {key: str(path) for key, path in paths.items()} | more
    return [sys.executable, "-m", "bertling.tools.programs", name, json.dumps(given)]


def run_program(command: Sequence[str]) -> str:
    """A program's standard output. Raises BertlingError with the last line of what a failed one said."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.strip() or f"ended with status {ended.returncode}").splitlines()[-1]
        raise BertlingError(f"{command[2]} {command[3]}: {said}")
    return ended.stdout


def timed(command: Sequence[str]) -> float:
    """Seconds of a whole process."""
    started = time.perf_counter()
    run_program(command)
    return time.perf_counter() - started


def told(command: Sequence[str]) -> float:
    """The seconds that a program says it measured, its getting ready left out."""
    return float(json.loads(run_program(command).splitlines()[-1])["seconds"])
