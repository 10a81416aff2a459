"""Our WordPiece against independent ones, on real lines: the plain Python of tests/plain_wordpiece.py, and a file of
results from elsewhere.

    python benchmarks/tokenizer.py --vocab VOCAB --input TEXT.txt.xz --lines 100000
    python benchmarks/tokenizer.py --vocab VOCAB --input TEXT.txt.xz --lines 100000 --against ids.jsonl.gz

The second file is made in an environment of its own by `--write-original ids.jsonl.gz`, with `transformers<5` and its
original Python tokenizer (`BertTokenizer`, not the fast one); that part imports nothing of bertling. There,
`--write-record tests/assets/wordpiece.json` makes the record that the tests hold us to.
"""

import argparse
import gzip
import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789äéñßœøıαβγσςжйéक日本語中の한🙂"
ENTRIES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"!?.,;:'\"-_$%&()[]/\\+=<>^`|~#@*{}—…«»¿、。"),
    *("##" + letter for letter in LETTERS),
    *(
        "A",
        "B",
        "Z",
        "É",
        "##A",
        "##Z",
        "the",
        "The",
        "un",
        "##able",
        "##ing",
        "##ed",
        "##s",
        "strass",
        "##e",
        "zurich",
    ),
    *("cafe", "café", "naive", "##ive", "don", "re", "##read", "3", "##5", "##00", "km", "10", "##th"),
]
AWKWARD = [
    *("", " ", "\t\n\r", "the", "The", "THE", "unable", "unables", "Zurich", "Zürich", "ZÜRICH", "cafe", "café"),
    *("cafe\u0301", "CAFÉ", "naïve", "straße", "STRASSE", "œuvre", "Ørsted", "ıstanbul", "İstanbul", "αβγ", "ΑΒΓ"),
    *("жй", "ЖЙ", "и\u0306", "नमक", "日本語", "日本 語", "中文abc中文", "かの", "한국", "🙂", "a🙂b", "👩\u200d🚀"),
    *("don't", "re-read", "$5.00", "3.5km", "10th", "a_b", "a--b", "...", "—", "…", "«the»", "¿the?", "the、the。"),
    *("[MASK]", "[MASK] the [UNK]", "the[MASK]the", "[mask]", "[CLS] the [SEP]", "[ MASK ]", "##ing", "the ##ing"),
    *("a" * 100, "a" * 101, "a" * 200 + " the", "the\u00a0the", "the\u3000the", "the\u2003the", "the\u200bthe"),
    *(
        "the\u00adthe",
        "the\0the",
        "the\ufffdthe",
        "\ufeffthe",
        "the\x07the",
        "the\x7fthe",
        "\u0301the",
        "e\u0301\u0302\u0303",
    ),
    *("^`|~<>+=", '"the"', "'the'", "(the)", "{the}", "the/the\\the", "#the", "@the", "x\u0000\u0301"),
]


def lines_of(path: Path, count: int) -> Iterator[str]:
    """The first lines that are not empty."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        yield from islice((line.rstrip("\n") for line in file if line.strip()), count)


def write_original(vocab: Path, source: Path, count: int, output: Path, *, lowercase: bool) -> None:
    """Ids by the original Python code."""
    import transformers

    assert int(transformers.__version__.split(".")[0]) < 5, "version 5 has only the fast tokenizer"
    tokenizer = transformers.BertTokenizer(str(vocab), do_lower_case=lowercase)
    with gzip.open(output, "wt") as file:
        for line in lines_of(source, count):
            ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(line))
            file.write(json.dumps(ids) + "\n")
    print(f"{output}: transformers {transformers.__version__}, {type(tokenizer).__name__}")


def write_record(output: Path) -> None:
    """What the original Python code makes of awkward texts."""
    import transformers

    assert int(transformers.__version__.split(".")[0]) < 5, "version 5 has only the fast tokenizer"
    entries = list(dict.fromkeys(ENTRIES))
    with tempfile.TemporaryDirectory() as folder:
        vocab = Path(folder) / "vocab.txt"
        vocab.write_text("".join(entry + "\n" for entry in entries), encoding="utf-8")
        uncased, cased = (transformers.BertTokenizer(str(vocab), do_lower_case=lower) for lower in (True, False))
    texts = [{"text": text, "uncased": uncased.tokenize(text), "cased": cased.tokenize(text)} for text in AWKWARD]
    record = {"made_by": f"transformers {transformers.__version__}, BertTokenizer", "entries": entries, "texts": texts}
    output.write_text(json.dumps(record, separators=(",", ":")) + "\n")


def compare(vocab: Path, source: Path, count: int, against: Path | None, *, lowercase: bool) -> int:
    """Print how many lines differ, and the first of them; returns their number."""
    import plain_wordpiece

    from bertling.tokenizer import Tokenizer

    ours = Tokenizer.load(vocab)
    tokenizer = Tokenizer(ours.entries, lowercase=lowercase)
    others = (json.loads(line) for line in gzip.open(against, "rt")) if against else None
    differ = total = tokens = 0
    for line in lines_of(source, count):
        ids, offsets = tokenizer.encode_with_offsets(line)
        if others is None:
            same = (ids, offsets) == plain_wordpiece.encode(line, tokenizer.ids, lowercase=lowercase)
        else:
            same = ids == next(others)
        total, tokens, differ = total + 1, tokens + len(ids), differ + (not same)
        if not same and differ <= 5:
            print("differs:", line[:200])
    what = "ids" if against else "ids and offsets"
    print(f"{vocab}: {total:,} lines, {tokens:,} tokens: {what} differ in {differ:,} lines")
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--cased", action="store_true")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--write-original", type=Path)
    parser.add_argument("--write-record", type=Path)
    options = parser.parse_args()
    if options.write_record:
        write_record(options.write_record)
        return
    if options.vocab is None or options.input is None:
        parser.error("--vocab and --input are needed")
    rest = (options.vocab, options.input, options.lines)
    if options.write_original:
        write_original(*rest, options.write_original, lowercase=not options.cased)
    else:
        sys.exit(bool(compare(*rest, options.against, lowercase=not options.cased)))


if __name__ == "__main__":
    main()
