"""The whole sentences among SST-2's training phrases, as text to pre-train on: those that are part of no other phrase.

    python benchmarks/sentences.py train.parquet reviews.txt

The labels are not read. Longest first, since a phrase can only be part of a longer one.
"""

import sys
from pathlib import Path

from bertling.files import atomic_write
from bertling.labelled import load_labelled


def whole(phrases: list[str]) -> list[str]:
    """Those whose words do not follow one another in a longer phrase."""
    parts: set[tuple[str, ...]] = set()
    found = []
    for words in sorted({tuple(phrase.split()) for phrase in phrases}, key=lambda words: (-len(words), words)):
        if words not in parts:
            found.append(" ".join(words))
            ends = range(1, len(words) + 1)
            parts.update(words[start:end] for end in ends for start in range(end))
    return found


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    sentences = whole(load_labelled(source).texts)
    atomic_write(target, "".join(f"{sentence}\n" for sentence in sentences))
    print(f"{target}: {len(sentences):,} sentences")


if __name__ == "__main__":
    main()
