"""SIGKILL at random moments while checkpoints are being written: is there always one to go on from?

    python benchmarks/kills.py --kills 200

After each kill the run is resumed as --resume does it. What must hold: an intact checkpoint is found, it is no older
than the last one whose writing had ended, and what was half-written is gone with the next one.
"""

import argparse
import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from bertling.checkpoint import TrainingState, load_checkpoint, newest_intact, save_checkpoint, step_folders
from bertling.model import BertForMaskedLM
from bertling.presets import preset_config
from bertling.runs import Start, open_run, record, resolve_start
from bertling.settings import Settings
from bertling.tokenizer import SPECIAL_TOKENS, Tokenizer


def write_for_ever(run: Path, first: int, pipe: int, model: BertForMaskedLM, tokenizer: Tokenizer) -> None:
    """What a training does, without the training: a checkpoint after each step, each step told once it is written."""
    moments = {f"0.{i}.exp_avg": value.detach().clone() for i, value in enumerate(model.parameters())}
    with open_run(Start(Settings(base_dir=run.parent.parent), frozenset(), run)):
        for step in range(first, 10**7):
            state = TrainingState({"step": step, "seconds": 0.0, "settings": Settings().to_ini()}, moments)
            save_checkpoint(run / "checkpoints", step, model, tokenizer, state, best=step % 3 == 0, keep=1)
            os.write(pipe, step.to_bytes(8, "little"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--width", type=int, default=256, help="of the model whose checkpoints are written")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(given.seed)
    tokenizer = Tokenizer([*SPECIAL_TOKENS, *(f"w{i}" for i in range(2000))])
    model = BertForMaskedLM(
        preset_config(
            "modern", "mini", tokenizer.vocab_size, max_position_embeddings=64, pad_token_id=0, hidden_size=given.width
        )
    )
    caught = torn = passed_over = written = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(base_dir=Path(folder), run_id="run0")
        with open_run(Start(settings, frozenset())) as run:
            record(run, settings, finished=False)
        last = -1
        for _ in range(given.kills):
            receive, send = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(receive)
                write_for_ever(run, last + 1, send, model, tokenizer)
            os.close(send)
            select.select([receive], [], [], 60)  # the first one is written
            time.sleep(chance.random() * 0.3)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told = b""
            while block := os.read(receive, 1 << 16):
                told += block
            os.close(receive)
            written += len(told) // 8
            last = int.from_bytes(told[-8:], "little")
            half = [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".step")]
            caught += bool(half)
            start = resolve_start("pretrain", [], {}, cp=run, resume=False)
            assert start.state is not None
            assert start.checkpoint is not None
            found, faults = newest_intact(run / "checkpoints")
            passed_over += len(faults)
            if start.state.numbers["step"] < last:
                print(f"FAIL: step {last} had been written, {found.name} is all that is left")
                return 1
            load_checkpoint(start.checkpoint)
            with open_run(start):
                torn += any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
            last = start.state.numbers["step"]
        left = len(step_folders(run / "checkpoints"))
    print(
        f"{given.kills} kills among {written:,} checkpoints, {caught} of them in the middle of one: each time the "
        f"newest checkpoint that had been written was found intact ({passed_over} damaged ones passed over); {torn} "
        f"half-written folders after the next start, {left} step folders in the end; {time.monotonic() - began:.0f} s"
    )
    return int(torn > 0)


if __name__ == "__main__":
    sys.exit(main())
