"""The command line as a user meets it, run in this process, and the small world that its tests share."""

import contextlib
import functools
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bertling import cli

ASSETS = Path(__file__).parent / "assets"
TEXT, VOCAB = ASSETS / "tiny.txt", ASSETS / "vocab"
SMALL = "--d-model 32 --heads 4 --n-layers 1 --dtype fp32 --threads 1".split()
FIRST_WORDS = ("the film", "this story", "a quiet scene", "her voice", "the last hour", "every joke", "my evening")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """Standard output, which must be one JSON object."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error of the user."""
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert (self.status, len(errors)) == (2, 1), f"status {self.status}: {self.err}"
        assert self.err.splitlines()[-1] == errors[0]
        assert self.out == ""
        return errors[0].removeprefix("error: ")


def bertling(*words: object, cwd: Path | None = None, stdin: bytes | None = b"", encoding: str | None = None) -> Ended:
    """Run `bertling WORDS`; without `stdin` standard input is closed, and `encoding` is that of standard output."""
    written, err = io.BytesIO(), io.StringIO()
    out = io.StringIO() if encoding is None else io.TextIOWrapper(written, encoding=encoding)
    status = 0
    with (
        mock.patch.object(sys, "argv", ["bertling", *map(str, words)]),
        mock.patch.object(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path()),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    out.flush()
    said = out.getvalue() if isinstance(out, io.StringIO) else written.getvalue().decode(out.encoding)
    return Ended(status, said, err.getvalue())


def listing(folder: Path) -> dict[str, int | None]:
    """Everything in a folder, hidden files too, with the sizes of files."""
    return {str(p.relative_to(folder)): p.stat().st_size if p.is_file() else None for p in folder.rglob("*")}


def write_labelled(path: Path, rows: int) -> Path:
    """Texts of two classes as a .tsv file."""
    lines = [f"{FIRST_WORDS[i % 7]} was {('dull', 'lovely')[i % 2]} on day {i}\t{i % 2}" for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return path


@dataclass(frozen=True)
class World:
    """A work folder with data sets of 16 ids a row, a pre-trained and a fine-tuned run."""

    base: Path
    train: Path
    dev: Path

    @property
    def data(self) -> Path:
        return self.base / "datasets"

    @property
    def mlm(self) -> Path:
        return self.base / "runs" / "mlm"

    @property
    def classifier(self) -> Path:
        return self.base / "runs" / "classes"


@functools.cache
def make_world(base: Path) -> World:
    """Build it through the commands themselves, once for all tests: they leave it as it is.

    `base` is the temporary folder of all tests.
    """
    folder = base / "world"
    world = World(folder / "wiki", write_labelled(folder / "train.tsv", 40), write_labelled(folder / "dev.tsv", 20))
    done = bertling("prepare", "-i", TEXT, "-l", "tiny", "-o", world.data, "-m", 16, "-v", VOCAB, "--workers", 1)
    assert done.status == 0, done.err
    steps = ["--base-dir", world.base, "--batch-size", 4, "--max-iters", 4, "--val-interval", 2]
    done = bertling("pretrain", *SMALL, *steps, "--run-id", "mlm")
    assert done.status == 0, done.err
    labelled = ["--train-input", world.train, "--val-input", world.dev]
    done = bertling("finetune", *SMALL, *steps, *labelled, "--cp", world.mlm, "--run-id", "classes")
    assert done.status == 0, done.err
    return world
