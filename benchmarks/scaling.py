"""How the cost of a training step grows: one thing is changed at a time, everything else stays at the hour's recipe.

    python benchmarks/scaling.py --json scaling.json --plot docs/images/scaling.png
    python benchmarks/scaling.py --corpus wiki.train.txt --vocab wiki/vocab

Each point is a process of its own that trains on made-up rows as `bertling pretrain` does; nothing else should run. The
table goes to standard output. `--processes` trains with 1 and 2 processes too (one thread each, through torchrun).
`--corpus` prepares beginnings of a text file instead, of several sizes, with one worker and with one a core.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bertling.runtime import available_cores
from bertling.settings import parse_settings
from bertling.tools.bench import bench
from bertling.tools.comparisons import timed
from bertling.tools.contestants import Workload, made_up_text

BASE = Workload("modern", 4, 256, 4, 8192, 64, 128, micro_batch_size=16, local_attention=16)
AXES: dict[str, list[Workload]] = {
    "rows in a step": [replace(BASE, batch_size=n) for n in (8, 16, 32, 64, 128)],
    "tokens in a row (8,192 in a step)": [
        replace(BASE, seq_len=n, batch_size=8192 // n, micro_batch_size=2048 // n)
        for n in (32, 64, 128, 256, 512, 1024)
    ],
    "width": [replace(BASE, width=n, heads=n // 64) for n in (128, 256, 384, 512, 768)],
    "blocks": [replace(BASE, layers=n) for n in (1, 2, 4, 8, 12)],
    "vocabulary": [replace(BASE, vocab_size=n) for n in (2048, 8192, 32_768, 65_536)],
}
VALUE = {
    "rows in a step": "batch_size",
    "tokens in a row (8,192 in a step)": "seq_len",
    "width": "width",
    "blocks": "layers",
    "vocabulary": "vocab_size",
}


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """One point."""
    settings = vars(parse_settings({"device": "auto"}))
    given = {name: settings[name] for name in ("device", "dtype", "compile")}
    report = bench(workload, against=False, rounds=rounds, settings=given, say=lambda text: None)
    ours = report.contestants[0]
    return {
        "workload": asdict(workload),
        "tokens_per_second": ours.tokens_per_second,
        "slowest": ours.slowest,
        "fastest": ours.fastest,
        "peak_bytes": ours.peak_bytes,
        "mfu": report.mfu,
    }


def processes(count: int, steps: int) -> dict[str, Any]:
    """The base workload on so many processes of one thread each: the median of the logged speeds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "datasets").mkdir()
        path, tokenizer = made_up_text(folder / "datasets", BASE)
        path.rename(path.with_name("train_x"))
        val = folder / "val"
        val.mkdir()
        made_up_text(val, BASE)[0].rename(folder / "datasets" / "val_x")
        tokenizer.save(folder / "vocab")
        words = f"pretrain --base-dir {folder} --run-id x --preset modern --local-attention 16 --batch-size 64".split()
        words += f"--optimizer muon --threads 1 --max-iters {steps} --val-interval 1000000".split()
        words += ["--micro-batch-size", "16", *(["--ddp", "--nproc", str(count)] if count > 1 else [])]
        subprocess.run([sys.executable, "-m", "bertling", *words], check=True, capture_output=True)
        lines = (folder / "runs" / "x" / "logs" / "metrics.jsonl").read_text().splitlines()
    speeds = [entry["perf/tokens_per_s"] for entry in map(json.loads, lines) if "perf/tokens_per_s" in entry]
    return {"processes": count, "tokens_per_second": statistics.median(speeds[len(speeds) // 4 :])}


def preparing(text: Path, vocab: Path, rounds: int) -> None:
    """`bertling prepare` on the first 25, 50, 100 ... million bytes of a text, whole process: a table."""
    whole = text.stat().st_size
    sizes = [size for size in (25_000_000 * 2**k for k in range(8)) if size < 0.9 * whole] + [whole]
    print("| text | workers | seconds (range) | MB a second |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        part = Path(name) / "part.txt"
        for size in sizes:
            beginning(text, part, size)
            for workers in sorted({1, available_cores()}):
                words = ["prepare", "-i", str(part), "-l", "x", "-o", f"{name}/datasets", "-m", "128", "-v", str(vocab)]
                command = [sys.executable, "-m", "bertling", *words, "--workers", str(workers)]
                seconds = []
                for _ in range(rounds):
                    shutil.rmtree(Path(name) / "datasets", ignore_errors=True)  # token ids are kept there to use again
                    seconds.append(timed(command))
                middle = statistics.median(seconds)
                print(
                    f"| {size / 1e6:,.0f} MB | {workers} | {middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | "
                    f"{size / 1e6 / middle:.1f} |",
                    flush=True,
                )


def beginning(text: Path, part: Path, size: int) -> None:
    """Write the whole lines within the first `size` bytes."""
    with text.open("rb") as source, part.open("wb") as target:
        for line in source:
            size -= len(line)
            if size < 0:
                break
            target.write(line)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each axis: tokens a second, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = [point["tokens_per_second"] for points in results.values() for point in points]
    memory = [point["peak_bytes"] / 1e9 for points in results.values() for point in points]
    marks = [mark for mark in (n * 10**k for k in range(2, 9) for n in (1, 2, 5)) if min(speeds) <= mark <= max(speeds)]
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(16, 3.2), constrained_layout=True)
    for panel, name in zip(panels, AXES, strict=True):
        values = [point["workload"][VALUE[name]] for point in results[name]]
        panel.plot(values, [point["tokens_per_second"] for point in results[name]], "o-", color="#0072B2")
        panel.set(xscale="log", yscale="log", xlabel=name)
        panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
        panel.set_ylim(min(speeds) / 1.2, max(speeds) * 1.2)  # the same in all panels: small changes look small
        panel.set_yticks(marks, [f"{mark:,}" for mark in marks])
        panel.minorticks_off()
        other = panel.twinx()
        other.plot(values, [point["peak_bytes"] / 1e9 for point in results[name]], "s--", color="#D55E00", markersize=4)
        other.set_ylim(0, max(memory) * 1.1)
        other.tick_params(axis="y", labelsize=7, colors="#D55E00")
        panel.tick_params(axis="y", labelsize=7, colors="#0072B2", which="both")
    figure.suptitle("tokens a second (blue, log scale) and peak memory in GB (orange)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--vocab", type=Path)
    options = parser.parse_args()
    if (options.corpus is None) != (options.vocab is None):
        parser.error("--corpus and --vocab go together")
    if options.corpus:
        preparing(options.corpus, options.vocab, options.rounds)
        return
    results = {}
    for name, workloads in AXES.items():
        results[name] = [measure(workload, options.rounds) for workload in workloads]
        print(f"\n| {name} | tokens/s (range) | share of the peak | memory |\n|---|---|---|---|")
        for point in results[name]:
            print(
                f"| {point['workload'][VALUE[name]]:,} | {point['tokens_per_second']:,.0f} ({point['slowest']:,.0f} to "
                f"{point['fastest']:,.0f}) | {point['mfu']:.0%} | {point['peak_bytes'] / 1e9:.2f} GB |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        plot(results, options.plot)
    if options.processes:
        for count in (1, available_cores()):
            point = processes(count, steps=30)
            print(f"{count} process(es), one thread each: {point['tokens_per_second']:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
