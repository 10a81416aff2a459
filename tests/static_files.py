"""Sample files with static masks."""

from collections.abc import Iterable
from pathlib import Path

from bertling.files import atomic_file
from bertling.packed import Ids, write_pairs


def write_msgpack(path: Path, blocks: Iterable[tuple[Ids, Ids]], rows: int) -> None:
    """Write `rows` samples from blocks of (ids, labels); gzip if .gz."""
    with atomic_file(path) as temporary, temporary.open("wb") as raw:
        write_pairs(raw, blocks, rows, zipped=path.suffix == ".gz")
