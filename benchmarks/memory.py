"""Memory of prepare and of training on a corpus, and on one ten times as large: the line must stay flat.

    python benchmarks/memory.py --megabytes 30

The corpus is made up: words drawn by Zipf's law, in documents of 2,000. What is measured is the private memory
(RssAnon) of all processes of the command together, five times a second; pages of files that are only mapped do not
count, since the system takes them back as it likes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMAND = [sys.executable, "-m", "bertling"]
SMALL = "--d-model 64 --heads 4 --n-layers 2 --dtype fp32 --batch-size 32 --device cpu --val-interval 1000".split()


def write_corpus(path: Path, megabytes: int) -> None:
    """Text of about that size."""
    chance = np.random.default_rng(0)
    words = np.array(["".join(chance.choice(list("etaoinshrdlu"), chance.integers(2, 9))) for _ in range(20_000)])
    with path.open("w") as file:
        number = 0
        while file.tell() < megabytes << 20:
            drawn = words[np.minimum(chance.zipf(1.3, 2000) - 1, len(words) - 1)]
            lines = [" ".join(drawn[i : i + 40]) for i in range(0, len(drawn), 40)]
            file.write(f" = Document {number} = \n" + " .\n".join(lines) + " .\n")
            number += 1


def family(root: int) -> list[int]:
    """A process and all that it has started."""
    found, fresh = [], [root]
    while fresh:
        found += fresh
        children = []
        for pid in fresh:
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    children += [int(word) for word in path.read_text().split()]
                except OSError:
                    continue
        fresh = children
    return found


def private_mib(pid: int) -> float:
    """The private memory of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def peak_of(words: list[str]) -> tuple[float, float]:
    """MiB at the most, and seconds, of a command."""
    began, peak = time.monotonic(), 0.0
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, sum(private_mib(pid) for pid in family(process.pid)))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.communicate()[1])
    return peak, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=30, help="of the smaller corpus")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| corpus | prepare | seconds | prepare --drop-duplicates | seconds | training, 100 steps | seconds |")
        print("|---|---|---|---|---|---|---|")
        for megabytes in (given.megabytes, 10 * given.megabytes):
            text, base = folder / f"{megabytes}.txt", folder / f"work{megabytes}"
            write_corpus(text, megabytes)
            if megabytes == given.megabytes:
                peak_of(["vocab", "-i", str(text), "-o", str(folder / "vocab"), "--size", "4000"])
            words = ["prepare", "-i", str(text), "-l", "x", "-m", "128", "-v", str(folder / "vocab")]
            plain = peak_of([*words, "-o", str(base / "datasets")])
            dropped = peak_of([*words, "-o", str(folder / f"dropped{megabytes}"), "--drop-duplicates"])
            trained = peak_of(["pretrain", "--base-dir", str(base), *SMALL, "--max-iters", "100"])
            cells = [f"{peak:,.0f} MiB | {seconds:.0f}" for peak, seconds in (plain, dropped, trained)]
            print(f"| {megabytes} MB | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
