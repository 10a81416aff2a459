"""What a command says: answers on standard output, all else on standard error, and every error as one line."""

import codecs
import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from bertling.files import BertlingError, readable_errors

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE", "1"
"""An environment variable that torch reads when it first allocates: what trains sets it before (runtime.py)."""


def say(text: str) -> None:
    """What is not an answer goes to standard error."""
    click.echo(text, err=True)


def program() -> str:
    """How a user calls bertling from here: by its name, or by its path where the name is not found."""
    own = Path(sys.executable).with_name("bertling")
    found = shutil.which("bertling")
    if found is not None and (not own.exists() or Path(found).resolve() == own.resolve()):
        return "bertling"
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m bertling"
    path = near(own)
    return shlex.quote(path if os.sep in path else f"./{path}")


def near(path: Path) -> str:
    """The path from here, where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def answer(value: Any, text: str, as_json: bool) -> None:
    """The answer of a command, on standard output."""
    plain = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a character, and still gets an answer
        sys.stdout.reconfigure(errors="backslashreplace")
        plain = codecs.lookup(sys.stdout.encoding).name != "utf-8"
    click.echo(json.dumps(value, ensure_ascii=plain) if as_json else text)


def is_first() -> bool:
    """Whether this is the process that answers."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def is_rank() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Within this context Ctrl-C waits: large libraries that are interrupted while they load do not mend."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def explain(error: Exception) -> str | None:
    """One line for the user; None for what only a programmer can mend."""
    if isinstance(error, click.Abort):
        return "interrupted"
    if isinstance(error, click.ClickException):
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "bertling"
        return f"{' '.join(error.format_message().split()).rstrip('.')}; '{where} --help' shows what it takes"
    of_torch = ("can't allocate memory", "backend out of memory")  # on a CPU, on Apple's GPU
    cuda = type(error).__name__ == "OutOfMemoryError"  # torch is not loaded
    if isinstance(error, MemoryError) or cuda or any(words in str(error) for words in of_torch):
        return "out of memory; lower micro-batch-size, or the size of the model"
    if isinstance(error, OSError):
        try:
            with readable_errors(Path(error.filename or "output")):
                raise error
        except BertlingError as readable:
            return str(readable)
    return " ".join(str(error).split()) if isinstance(error, BertlingError) else None


def forget(stream: TextIO) -> None:
    """Send what is still buffered, and all that follows, nowhere: Python would try again at the end, and complain."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class Lasting:
    """Standard error for as long as someone takes it; a closed pipe or terminal, or a full disk, ends no training.

    A run's log.txt has the same messages.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            forget(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            forget(self._stream)


@contextlib.contextmanager
def clean_end() -> Iterator[None]:
    """Within this context SIGTERM ends the process as Ctrl-C does: what is half-written is taken away; status 143.

    For commands whose main thread waits in Python: a long call into a library would put the end off.
    """

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
