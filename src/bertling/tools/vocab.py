"""A vocabulary out of text files."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bertling.files import BertlingError, atomic_folder
from bertling.progress import ByteProgress
from bertling.text import Lines, TextOptions
from bertling.tokenizer import train_vocabulary


def make_vocabulary(
    inputs: Sequence[Path],
    output: Path,
    size: int,
    *,
    lowercase: bool = True,
    wikitext: bool | None = None,
    force: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train a WordPiece vocabulary on the files and write it to `output`; an existing one is kept unless `force`."""
    present = output / "vocab.txt"
    if present.exists() and not force:
        raise BertlingError(f"{present}: exists already; give --force to replace it, or choose another folder")
    began = time.monotonic()

    with ByteProgress("reading") as progress:
        lines = Lines(inputs, TextOptions(wikitext=wikitext), progress, reads=2)
        tokenizer = train_vocabulary(lines, size, lowercase=lowercase)
    if tokenizer.vocab_size < size:
        say(f"note: the text gave {tokenizer.vocab_size:,} entries, not {size:,}")
    with atomic_folder(output, force=True) as temporary:
        tokenizer.save(temporary)
    seconds = time.monotonic() - began
    return {
        "folder": str(output),
        "entries": tokenizer.vocab_size,
        "seconds": seconds,
        "fingerprint": tokenizer.fingerprint,
    }
