"""One row of docs/results.md in one command, from raw text to its figures, a plot and a small classifier.

    bertling download sst2 -o reproduced/datasets/sst2
    python benchmarks/reproduce.py -c configs/cpu-1h.ini --text wiki.train.tokens --val-text wiki.valid.tokens

It runs what a user would type, and shows it: vocab, prepare, pretrain, evaluate, finetune with five seeds, export of
the first of them. What is done is noted in WORK/reproduce.json; stopped or killed, the same command goes on where it
was. Other settings of either training go through --pretrain and --finetune, other tables than SST-2's through the
latter.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertling.files import BertlingError, read_json, write_json
from bertling.settings import read_settings

FINETUNE = "--batch-size 32 --epochs 2 --learning-rate 3e-4"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, required=True, help="settings file of the pre-training")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text to train on")
    parser.add_argument("--val-text", type=Path, required=True, help="text whose masked words are scored")
    parser.add_argument("--work", type=Path, default=Path("reproduced"), help="work folder (default: reproduced)")
    parser.add_argument("--name", help="of the runs (default: the settings file's)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="entries (default: 8192)")
    parser.add_argument("--seeds", type=int, default=5, help="fine-tunings (default: 5)")
    parser.add_argument("--pretrain", default="", help="further flags of the pre-training: --pretrain='...'")
    parser.add_argument("--finetune", default=FINETUNE, help=f"flags of the fine-tuning (default: '{FINETUNE}')")
    options = parser.parse_args(arguments)

    work, name = options.work, options.name or options.config.stem
    length = read_settings([options.config], {})[0].seq_len
    vocab, datasets, runs = work / "vocab", work / "datasets", work / "runs"
    mlm, classes = f"{name}-mlm", f"{name}-classes"
    steps = Steps(work)
    if "--train-input" not in options.finetune:
        check_sst2(work)

    texts = [word for path in options.text for word in ("-i", path)]
    steps.do("vocab", "vocab", *texts, "-o", vocab, "--size", options.vocab_size, "--force")
    rows = ("-l", "text", "-o", datasets, "-m", length, "-v", vocab, "--force")
    steps.do("prepare", "prepare", *texts, "--val-input", options.val_text, *rows)
    words = ("-c", options.config, *shlex.split(options.pretrain))
    trained = steps.train(mlm, "pretrain", *words)
    last = runs / mlm / "checkpoints" / "last"
    scored = steps.do(f"{mlm}: score", "evaluate", "--cp", last, "--data", datasets / f"val_text_{length}_123")
    words = ("--cp", last, "--seeds", options.seeds, *shlex.split(options.finetune))
    tuned = steps.train(classes, "finetune", *words)
    first = Path(tuned["seeds"][0]["run"]) / "checkpoints" / "last"
    steps.do(f"{classes}: export", "export", "--cp", first, "-o", work / classes, "--force")

    accuracy = tuned["accuracy"]
    spread = "" if accuracy["sd"] is None else f" ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})"
    print(f"| pre-training | steps; minutes | masked words (loss) | classes, mean of {accuracy['n']} (95 % interval) |")
    print("|---|---|---|---|")
    print(
        f"| {name} | {trained['step']:,}; {trained['seconds'] / 60:.0f} | {100 * scored['accuracy']:.1f} % "
        f"({scored['loss']:.3f}) | {100 * accuracy['mean']:.1f} %{spread} |"
    )
    print(f"\nplots: {runs / mlm}/accuracy.png, {first.parents[1]}/accuracy.png; classifier: {work / classes}")


def check_sst2(work: Path) -> None:
    """Say now, not after hours, that the tables are missing."""
    from bertling.labelled import sst2_files

    try:
        sst2_files(work)
    except BertlingError as error:
        sys.exit(f"error: {error}")


class Steps:
    """Commands, each of them done once: its words and its answer are noted."""

    def __init__(self, work: Path) -> None:
        self.work, self.path = work, work / "reproduce.json"
        self.notes = read_json(self.path, "record of steps") if self.path.exists() else {}

    def do(self, step: str, *words: object, resumed: Sequence[object] = ()) -> Any:
        """The answer of `bertling WORDS`, or of `bertling RESUMED` where that goes on with what was begun."""
        asked = [str(word) for word in words]
        note = self.notes.setdefault(step, {"words": asked})
        if note["words"] != asked and ("answer" in note or resumed):
            done = shlex.join(note["words"])
            sys.exit(f"error: {self.path}: '{step}' was done by 'bertling {done}'; name another --work or --name")
        if "answer" not in note:
            note |= {"words": asked, "answer": bertling([str(word) for word in resumed] or asked)}
            write_json(self.path, self.notes)
        return note["answer"]

    def train(self, run: str, command: str, *words: object) -> Any:
        """The same for a training, which may have been begun: all its seeds, if they are several, have its name."""
        from bertling.runs import is_finished

        step, runs, names = f"{run}: train", self.work / "runs", ("--base-dir", self.work, "--run-id", run)
        begun = [*runs.glob(f"{run}/checkpoints/step-*"), *runs.glob(f"{run}-seed*/checkpoints/step-*")]
        if not begun and "answer" not in self.notes.get(step, {}):
            # Noted before it begins: a training that goes on keeps its settings, whatever is asked for then.
            self.notes[step] = {"words": [command, *map(str, (*words, *names))]}
            write_json(self.path, self.notes)
        note = self.notes.get(step, {})
        if begun and "answer" not in note and is_finished(runs / run):
            # Killed between the end of the training and the note of it: its state knows how long it was.
            state = read_json(runs / run / "checkpoints" / "last" / "training_state.json", "training state")
            note["answer"] = {name: state[name] for name in ("step", "seconds")}
            write_json(self.path, self.notes)
        return self.do(step, command, *words, *names, resumed=(command, "--resume", *names) if begun else ())


def bertling(words: Sequence[str]) -> Any:
    """What a command answers; this program ends with it where it was stopped or failed."""
    print(f"\n$ bertling {shlex.join(words)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bertling", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        # A training that is asked to stop saves first: wait for it. Control-C reaches it by itself, SIGTERM does not.
        before = [
            signal.signal(signal.SIGINT, lambda number, frame: None),
            signal.signal(signal.SIGTERM, lambda number, frame: running.send_signal(number)),
        ]
        try:
            out = running.communicate()[0]
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)
    if running.returncode:
        sys.exit(running.returncode if running.returncode > 0 else 128 - running.returncode)
    return json.loads(out)


if __name__ == "__main__":
    main()
