"""A vocabulary out of text files."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertling.files import BertlingError, atomic_folder, claimed, readable_errors, refuse_file, sweep
from bertling.progress import ByteProgress
from bertling.text import Lines, TextOptions
from bertling.tokenizer import Tokenizer, train_vocabulary

FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")


def make_vocabulary(
    inputs: Sequence[Path],
    output: Path,
    size: int,
    *,
    options: TextOptions,
    lowercase: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Train a WordPiece vocabulary on the files and write it to `output`; an existing one is kept unless `force`."""
    refuse_file(output, "the vocabulary")
    if not force:
        check_free(output)
    began = time.monotonic()
    with ByteProgress("reading") as progress:
        tokenizer = train_vocabulary(Lines(inputs, options, progress, reads=2), size, lowercase=lowercase)
    if not force:  # another one may have been made meanwhile
        check_free(output)
    save_into(output, tokenizer)
    return {
        "folder": str(output),
        "entries": tokenizer.vocab_size,
        "seconds": time.monotonic() - began,
        "fingerprint": tokenizer.fingerprint,
    }


def check_free(output: Path) -> None:
    """Refuse a folder that holds a vocabulary."""
    for present in (output / name for name in FILES):
        if present.exists():
            raise BertlingError(f"{present}: exists already; give --force to replace it, or choose another folder")


def save_into(output: Path, tokenizer: Tokenizer) -> None:
    """Write the vocabulary's files; whatever else lies in an existing folder stays."""
    if not output.exists():
        with atomic_folder(output) as temporary:
            tokenizer.save(temporary)
        return
    with readable_errors(output):
        sweep(output)
        with claimed(output, "vocab") as temporary:
            try:
                tokenizer.save(temporary)
                for name in reversed(FILES):  # vocab.txt, which is the truth, comes last
                    os.replace(temporary / name, output / name)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
