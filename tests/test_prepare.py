"""Preparation: whole documents in one split each, nothing lost, made once, the same bytes for the same seed."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertling import prepare as module
from bertling.datacard import DataCard
from bertling.files import BertlingError
from bertling.packed import IGNORED
from bertling.prepare import prepare
from bertling.samples import MANIFEST, SamplesWriter, open_samples
from bertling.splits import shares_of
from bertling.tokenizer import SPECIAL_TOKENS, Tokenizer

SEQ_LEN = 16
WIDTH = SEQ_LEN - 2
LETTERS = "abcdefghij"
WORDS = [a + b + c for a in LETTERS for b in LETTERS for c in "xyz"]
TOKENIZER = Tokenizer([*SPECIAL_TOKENS, "=", *WORDS])
BLOCKS = (
    " different document(s) are too few, or too unequal, to be dealt out as 80%, 10%, 10%: cut into contiguous blocks"
)


def document(number: int, words: int) -> str:
    """A document whose words tell where it is from."""
    here = np.random.default_rng(number).choice(WORDS, words)
    return f" = {WORDS[number]} = \n {' '.join(here)} \n"


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(documents))
    return path


def run(inputs: Path | list[Path], output: Path, **options: Any) -> DataCard:
    paths = [inputs] if isinstance(inputs, Path) else inputs
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "workers": 1, **options}
    return prepare(paths, arguments.pop("label", "toy"), output, tokenizer=TOKENIZER, **arguments)


def begin(source: Path, output: Path, *more: str) -> "subprocess.Popen[str]":
    """The same in a process of its own."""
    vocabulary = Path(__file__).parent / "assets" / "vocab"
    command = ["prepare", "-i", str(source), "-l", "x", "-o", str(output), "-m", str(SEQ_LEN), "-v", str(vocabulary)]
    return subprocess.Popen(
        [sys.executable, "-m", "bertling", *command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stream(path: Path) -> list[int]:
    """The text of a split: its rows without [CLS], [SEP] and padding."""
    samples = open_samples(path)
    rows = samples.fetch_originals(np.arange(samples.rows))
    assert (rows[:, 0] == TOKENIZER.cls_id).all()
    text = []
    for row in rows.tolist():
        end = row.index(TOKENIZER.sep_id)
        assert set(row[end + 1 :]) <= {TOKENIZER.pad_id}
        text += row[1:end]
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_documents_stay_whole_and_nothing_is_lost(tmp_path: Path) -> None:
    documents = [document(i, 20 + 5 * (i % 7)) for i in range(60)]
    card = run(write(tmp_path / "t.txt", documents), tmp_path / "out")
    ids = {tuple(TOKENIZER.encode(text)) for text in documents}
    seen: dict[str, set[int]] = {}
    for split in ("train", "val", "test"):
        text = stream(tmp_path / "out" / f"{split}_toy_16_123")
        starts = [i for i, (a, b) in enumerate(zip(text, text[2:], strict=False)) if a == b == TOKENIZER.ids["="]]
        found = [tuple(text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        if split == "train":
            assert ids >= set(found[:-1]), "train may drop the end of its last document"
        else:
            assert ids >= set(found)
        seen[split] = {one[1] for one in found}
        assert card.splits[split].documents == len(found)
    assert sum(map(len, seen.values())) == 60 == len(set.union(*seen.values()))
    tokens = {name: split.tokens - 2 * split.samples + split.dropped_tokens for name, split in card.splits.items()}
    assert sum(tokens.values()) == card.tokens == sum(map(len, ids))
    assert 0 <= card.splits["train"].dropped_tokens < WIDTH
    assert card.splits["val"].dropped_tokens == card.splits["test"].dropped_tokens == 0
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert tokens[name] / card.tokens == pytest.approx(share, abs=0.02)
    assert all(both == {"documents": 0, "samples": 0} for both in card.overlap.values())
    assert card.splits["train"].padded_samples == 0
    assert (card.documents, card.notes) == (60, [])


def test_val_and_test_keep_the_order_of_the_file_and_train_does_not(tmp_path: Path) -> None:
    run(write(tmp_path / "t.txt", [document(i, 20) for i in range(60)]), tmp_path / "out", split=(0.4, 0.3, 0.3))
    for split in ("train", "val", "test"):
        text = stream(tmp_path / "out" / f"{split}_toy_16_123")
        titles = [b for a, b, c in zip(text, text[1:], text[2:], strict=False) if a == c == TOKENIZER.ids["="]]
        assert (titles == sorted(titles)) == (split != "train")


@pytest.mark.parametrize("method", ["split", "segment"])
def test_what_one_seed_trains_on_never_validates_another(tmp_path: Path, method: str) -> None:
    source = write(tmp_path / "t.txt", [document(i, 20 + 5 * (i % 7)) for i in range(60)])
    titles: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}
    for seed in range(4):
        card = run(source, tmp_path / "out", seed=seed, method=method)
        for split, found in titles.items():
            text = stream(tmp_path / "out" / f"{split}_toy_16_{seed}")
            marks = zip(text, text[1:], text[2:], strict=False)
            found.append([title for a, title, c in marks if a == c == TOKENIZER.ids["="]])
            if method == "split":
                tokens = card.splits[split].tokens - 2 * card.splits[split].samples
                assert tokens / card.tokens == pytest.approx(0.8 if split == "train" else 0.1, abs=0.03)
    train, val, test = ({title for one in found for title in one} for found in titles.values())
    assert train | val | test == {TOKENIZER.ids[WORDS[i]] for i in range(60)}
    assert len(train) + len(val) + len(test) == 60
    assert len({tuple(one) for one in titles["train"]}) == 4, "each seed has an order of its own"
    assert len({tuple(one) for one in titles["val"]}) == len({tuple(one) for one in titles["test"]}) == 1


def test_identical_documents_go_to_one_split(tmp_path: Path) -> None:
    documents = [document(i % 10, 30) for i in range(60)]
    card = run(write(tmp_path / "t.txt", documents), tmp_path / "out")
    assert card.duplicate_documents == 50
    assert {both["documents"] for both in card.overlap.values()} == {0}
    assert all(split.documents % 6 == 0 for split in card.splits.values())


@pytest.mark.parametrize("method", ["split", "segment"])
@pytest.mark.parametrize(
    ("form", "ending"), [("shards", ""), ("msgpack", ".msgpack.gz"), ("msgpack-plain", ".msgpack")]
)
def test_same_seed_same_bytes(tmp_path: Path, method: str, form: str, ending: str) -> None:
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(source, tmp_path / name, seed=seed, method=method, format=form, label="x")
    for split in ("train", "val", "test"):
        a, b = (tmp_path / name / f"{split}_x_16_1{ending}" for name in "ab")
        c = tmp_path / "c" / f"{split}_x_16_2{ending}"
        if ending:
            assert a.read_bytes() == b.read_bytes() != c.read_bytes()
            assert open_samples(a).rows > 0
        else:
            assert contents(a) == contents(b)
            assert (stream(a) != stream(c)) == (split == "train")


def test_msgpack_holds_the_same_rows_with_static_masks(tmp_path: Path) -> None:
    source = write(tmp_path / "t.txt", [document(i, 100) for i in range(40)])
    card = run(source, tmp_path / "out")
    other = run(source, tmp_path / "static", format="msgpack")
    assert {n: s.samples for n, s in card.splits.items()} == {n: s.samples for n, s in other.splits.items()}
    samples = open_samples(tmp_path / "static" / "train_toy_16_123.msgpack.gz")
    plain = open_samples(tmp_path / "out" / "train_toy_16_123")
    everything = np.arange(samples.rows)
    assert samples.rows == plain.rows
    assert (samples.fetch_originals(everything) == plain.fetch(everything)).all()
    labels, ids = samples.fetch_labels(everything), samples.fetch(everything)
    scored = labels != IGNORED
    assert set(scored.sum(axis=1)) == {2}
    assert (ids[scored] == TOKENIZER.mask_id).mean() == pytest.approx(0.8, abs=0.1)
    assert not np.isin(labels[scored], TOKENIZER.special_ids).any()


def test_static_masks_leave_id_0_alone_where_it_is_a_word(tmp_path: Path) -> None:
    tokenizer = Tokenizer([WORDS[0], *SPECIAL_TOKENS, "=", *WORDS[1:]])
    source = tmp_path / "t.txt"
    source.write_text(f"{WORDS[0]} {WORDS[1]} " * 500)
    prepare([source], "toy", tmp_path / "out", SEQ_LEN, tokenizer, format="msgpack", workers=1)
    samples = open_samples(tmp_path / "out" / "train_toy_16_123.msgpack.gz")
    labels = samples.fetch_labels(np.arange(samples.rows))
    assert set(np.unique(labels)) == {IGNORED, tokenizer.ids[WORDS[1]]}


def test_token_ids_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    run(source, tmp_path / "out")
    (ids,) = (tmp_path / "out" / "ids").glob("*/ids.bin")
    before = ids.stat()

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    monkeypatch.setattr(Tokenizer, "encode", refuse)
    run(source, tmp_path / "out", seed=5)
    run(source, tmp_path / "out", label="other")
    run(source, tmp_path / "out", seq_len=24, format="msgpack")
    after = ids.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    write(source, [document(i, 31) for i in range(40)])
    with pytest.raises(AssertionError, match="tokenised again"):
        run(source, tmp_path / "out", label="changed")


def test_segments(tmp_path: Path) -> None:
    documents = [document(i, 30 + i) for i in range(40)]
    card = run(write(tmp_path / "t.txt", documents), tmp_path / "out", method="segment")
    assert card.splits["train"].padded_samples > 0
    rows = sum(split.samples for split in card.splits.values())
    # Pieces of 4 * 14 characters within a document; the text of one begins with its title line.
    pieces = sum(-(-len(text.strip()) // (4 * WIDTH)) for text in documents)
    assert abs(rows - pieces) <= len(documents)
    tokens = sum(split.tokens - 2 * split.samples + split.dropped_tokens for split in card.splits.values())
    assert tokens == card.tokens
    starts = []
    for split in card.splits.values():
        samples = open_samples(tmp_path / "out" / split.path)
        found = samples.fetch(np.arange(samples.rows))
        starts += [int(row[2]) for row in found if row[1] == row[3] == TOKENIZER.ids["="]]
    assert sorted(starts) == [TOKENIZER.ids[WORDS[i]] for i in range(40)], "every document begins a row"
    assert {both["documents"] for both in card.overlap.values()} == {0}


def test_a_piece_with_more_tokens_than_a_row_is_cut(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("= " * 2000)
    card = run(source, tmp_path / "out", method="segment")
    samples = sum(split.samples for split in card.splits.values())
    assert (samples, card.tokens) == (72, 2000), "28 tokens a piece of 56 characters"
    assert sum(split.dropped_tokens for split in card.splits.values()) == 2000 - 71 * WIDTH - 12
    assert card.splits["train"].padded_samples == 0


@pytest.mark.parametrize("method", ["split", "segment"])
def test_a_single_document_is_cut_into_contiguous_blocks(tmp_path: Path, method: str) -> None:
    words = [WORDS[i % len(WORDS)] for i in range(2000)]
    source = tmp_path / "t.txt"
    source.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, 2000, 10)))
    card = run(source, tmp_path / "out", method=method)
    assert card.notes == ["1" + BLOCKS]
    assert card.overlap["train/val"]["documents"] == 1
    assert "cut into contiguous blocks" in card.text()
    if method == "split":
        whole = TOKENIZER.encode(" ".join(words))
        assert stream(tmp_path / "out" / "train_toy_16_123") == whole[: 1600 // WIDTH * WIDTH]
        assert stream(tmp_path / "out" / "val_toy_16_123") == whole[1600:1800]
        assert stream(tmp_path / "out" / "test_toy_16_123") == whole[1800:]
    else:
        sizes = [split.tokens - 2 * split.samples for split in card.splits.values()]
        assert [round(size / sum(sizes), 1) for size in sizes] == [0.8, 0.1, 0.1]


@pytest.mark.parametrize("method", ["split", "segment"])
@pytest.mark.parametrize(
    ("lengths", "held"), [([50] * 3, [3, 1, 1]), ([50] * 4, [4, 1, 1]), ([3000, 30, 30], [1, 1, 3])]
)
def test_documents_that_would_give_other_shares_are_cut(
    tmp_path: Path, lengths: list[int], held: list[int], method: str
) -> None:
    documents = [document(i, words) for i, words in enumerate(lengths)]
    card = run(write(tmp_path / "t.txt", documents), tmp_path / "out", method=method)
    assert card.notes == [f"{len(lengths)}{BLOCKS}"]
    assert [split.documents for split in card.splits.values()] == held
    assert {both["documents"] for both in card.overlap.values()} == {1}  # the one that both cuts go through
    tokens = [split.tokens - 2 * split.samples for split in card.splits.values()]
    assert tokens[0] / sum(tokens) == pytest.approx(0.8, abs=0.06)
    assert tokens[1] == pytest.approx(tokens[2], abs=1 if method == "split" else 2 * WIDTH)


def test_few_documents_that_come_near_the_shares_stay_whole(tmp_path: Path) -> None:
    card = run(write(tmp_path / "t.txt", [document(i, 50) for i in range(7)]), tmp_path / "out")
    assert sorted(split.documents for split in card.splits.values()) == [1, 1, 5]
    assert card.notes == []
    card = run(write(tmp_path / "t.txt", [document(i % 2, 50) for i in range(6)]), tmp_path / "two")
    assert card.notes == ["2" + BLOCKS]


def test_one_large_document_goes_to_train(tmp_path: Path) -> None:
    documents = [document(i, 20) for i in range(10)]
    for number in range(40, 45):
        source = write(tmp_path / "t.txt", [*documents[:5], document(number, 2000), *documents[5:]])
        card = run(source, tmp_path / str(number))
        assert card.splits["train"].tokens > 2000
        assert card.splits["val"].documents > 0


def test_official_files(tmp_path: Path) -> None:
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    val = write(tmp_path / "v.txt", [document(i, 30) for i in (50, 51, 51)])
    test = write(tmp_path / "s.txt", [document(i, 30) for i in (60, 3)])
    card = run(source, tmp_path / "a", val_inputs=[val])
    assert list(card.splits) == ["train", "val"]
    assert not (tmp_path / "a" / "test_toy_16_123").exists()
    assert (card.splits["train"].documents, card.splits["val"].documents) == (40, 3)
    expected = [i for text in val.read_text().split("\n") for i in TOKENIZER.encode(text)]
    assert stream(tmp_path / "a" / "val_toy_16_123") == expected

    card = run(source, tmp_path / "b", val_inputs=[val], test_inputs=[test], drop_duplicates=True)
    assert card.splits["val"].documents == 3, "an official file stays as it is"
    assert card.overlap["train/test"]["documents"] == 1
    assert card.notes == ["1 document(s) are in train and in test: leave them out of one of the inputs"]

    card = run(source, tmp_path / "c", val_inputs=[val], split=(0.8, 0.0, 0.2))
    assert [split.documents for split in card.splits.values()] == [32, 3, 8]


def test_duplicates_are_dropped_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "t.txt", [document(i % 30, 30) for i in range(40)])
    card = run(source, tmp_path / "out", drop_duplicates=True)
    assert card.documents == 30
    assert any("left out" in note for note in card.notes)


def test_shares() -> None:
    assert shares_of(None, False, False) == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1})
    assert shares_of(None, True, False) == shares_of(None, True, True) == {"train": 1.0}
    assert shares_of((0.6, 0.2, 0.2), True, False) == pytest.approx({"train": 0.75, "test": 0.25})
    assert shares_of((0.9, 0.1, 0.0), False, False) == pytest.approx({"train": 0.9, "val": 0.1})
    for split in [(0.5, 0.1, 0.1), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5), (0.5, 0.5)]:
        with pytest.raises(BertlingError, match="split: must be three shares that add up to 1"):
            shares_of(split, False, False)  # type: ignore[arg-type]
    with pytest.raises(BertlingError, match="split: the share of train must be above 0"):
        shares_of((0.0, 0.5, 0.5), False, False)


def test_card(tmp_path: Path) -> None:
    source = write(tmp_path / "t.txt", [*(document(i, 30) for i in range(40)), " = aax = \n aax unknown aax \n"])
    card = run(source, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "card_toy_16_123.json").read_text())
    assert saved == json.loads(json.dumps(card.to_dict()))
    text = np.array([i for i in stream(tmp_path / "out" / "train_toy_16_123") if i not in TOKENIZER.special_ids])
    values, counts = np.unique(text, return_counts=True)
    shares = counts / counts.sum()
    assert card.unigram_accuracy == pytest.approx(shares.max())
    assert card.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    val = stream(tmp_path / "out" / "val_toy_16_123")
    assert card.splits["val"].unigram_accuracy == pytest.approx(val.count(values[counts.argmax()]) / len(val), rel=0.05)
    assert saved["unk_percent"] == pytest.approx(100 * card.unk_tokens / card.tokens)
    assert card.unk_tokens == 1
    thrice = write(tmp_path / "thrice.txt", [document(i, 30) for i in range(40)] * 3)
    for drop in (False, True):
        told = run(thrice, tmp_path / "thrice", label=str(drop), drop_duplicates=drop).to_dict()
        assert told["duplicate_documents_percent"] == pytest.approx(200 / 3)
    assert saved["tokens_per_character"] * saved["characters_per_token"] == pytest.approx(1)
    assert f"{card.tokens:,}" in card.text()
    manifest = json.loads((tmp_path / "out" / "val_toy_16_123" / MANIFEST).read_text())
    assert (manifest["split"], manifest["label"], manifest["seed"], manifest["method"]) == ("val", "toy", 123, "split")
    assert manifest["vocab_fingerprint"] == TOKENIZER.fingerprint
    assert Tokenizer.load(tmp_path / "out" / "val_toy_16_123").fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 7}, "max-len: must lie between 8 and"),
        ({"seq_len": 1 << 30}, "max-len: must lie between 8 and"),
        ({"seed": -1}, "seed: must be 0 or more"),
        ({"label": "../x"}, "label: '../x' must be letters"),
        ({"label": ""}, "label: '' must be letters"),
        ({"method": "cut"}, "method: must be split or segment, not 'cut'"),
        ({"format": "zip"}, "format: must be one of shards, msgpack, msgpack-plain, not 'zip'"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BertlingError, match=message):
        run(tmp_path / "missing.txt", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match="input: no text file is given"):
        run([], tmp_path / "out")
    with pytest.raises(BertlingError, match=r"missing\.txt"):
        run(tmp_path / "missing.txt", tmp_path / "out")
    source = tmp_path / "t.txt"
    source.write_text(" ".join(WORDS[:15]))
    with pytest.raises(BertlingError, match=r"t\.txt: its 12 training tokens are fewer than one sample of 14"):
        run(source, tmp_path / "out")
    source.write_text(WORDS[0])
    with pytest.raises(BertlingError, match=r"t\.txt: its 1 training tokens are fewer than one sample"):
        run(source, tmp_path / "out", method="segment")
    source.write_text("= " * 30)
    with pytest.raises(BertlingError, match=r"t\.txt: too short for a test split"):
        run(source, tmp_path / "out", method="segment")
    (tmp_path / "file").touch()
    with pytest.raises(BertlingError, match="file: is a file; give a folder"):
        run(source, tmp_path / "file")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ids"]


def test_existing_data_is_replaced_only_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    val = write(tmp_path / "v.txt", [document(50, 30)])
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_corpus", lambda *_, **__: pytest.fail("worked before it refused"))
        with pytest.raises(BertlingError, match=r"train_toy_16_123: exists already; give --force"):
            run(source, out)
    assert contents(out) == before
    card = run(source, out, val_inputs=[val], force=True)
    assert not (out / "test_toy_16_123").exists(), "its documents are training text now"
    assert card.notes == ["test_toy_16_123 of an earlier preparation was removed"]
    (out / "val_toy_16_123").rename(tmp_path / "elsewhere")
    (out / "val_toy_16_123").symlink_to(tmp_path / "elsewhere")
    assert run(source, out, split=(0.9, 0, 0.1), force=True).notes == [
        "val_toy_16_123 of an earlier preparation was removed"
    ]
    assert (tmp_path / "elsewhere" / MANIFEST).exists(), "a link goes, not what it leads to"
    run(source, out, val_inputs=[val], force=True)
    with pytest.raises(BertlingError, match=r"train_toy_16_123: exists already; give --force"):
        run(source, out, format="msgpack")
    card = run(source, out, format="msgpack", force=True)
    assert len(card.notes) == 2, "train and val of the other format"
    assert {path.name for path in out.glob("*_toy_*")} == {
        "card_toy_16_123.json",
        *(f"{split}_toy_16_123.msgpack.gz" for split in ("train", "val", "test")),
    }
    card = run(source, out, format="msgpack", split=(1.0, 0.0, 0.0), force=True)
    assert list(card.splits) == ["train"]
    assert not (out / "val_toy_16_123.msgpack.gz").exists()


def test_names_of_special_tokens_in_a_text_are_words(tmp_path: Path) -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "[", "]", "pad", "cls", "sep", "mask", "a"])
    source = tmp_path / "t.txt"
    source.write_text("a [CLS] a [SEP] a [PAD] a [MASK] a [UNK]\n" * 100)
    card = prepare([source], "toy", tmp_path / "out", SEQ_LEN, tokenizer, workers=1)
    rows = open_samples(tmp_path / "out" / "train_toy_16_123").fetch(np.arange(card.splits["train"].samples))
    assert not np.isin(rows[:, 1:-1], [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]).any()
    assert (rows == tokenizer.unk_id).any()
    assert card.splits["train"].padded_samples == 0


def test_all_files_are_looked_for_before_any_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    for name in ("val_inputs", "test_inputs"):
        with pytest.raises(BertlingError, match=r"none\.txt: no such file"):
            run(source, tmp_path / "out", **{name: [tmp_path / "none.txt"]})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BertlingError, match="pipe: can be read only once"):
        run(tmp_path / "pipe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["shards", "msgpack"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    out = tmp_path / "out"
    run(source, out, format=form)
    before = contents(out)
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    if form == "shards":
        monkeypatch.setattr(SamplesWriter, "append", full)
    else:
        monkeypatch.setattr(module, "write_pairs", full)
    with pytest.raises(BertlingError, match=r"val_toy_16_123.*: the disk is full"):
        run(source, out, format=form, force=True)
    assert contents(out) == before
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_progress_is_passed_on(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = write(tmp_path / "t.txt", [document(i, 30) for i in range(40)])
    run(source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1] == (source.stat().st_size, source.stat().st_size)


def test_two_preparations_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Both run at once over different texts; whichever is first, its splits and its card belong together."""
    for name, line in (("one", "the old lamp was bright . "), ("two", "a quiet river in the night . ")):
        (tmp_path / f"{name}.txt").write_text("".join(f" = T{i} = \n{line * 200}\n" for i in range(60)))
    processes = [
        begin(tmp_path / f"{name}.txt", tmp_path / "data", "--workers", "1", "--json") for name in ("one", "two")
    ]
    ended = [(*process.communicate(), process.returncode) for process in processes]
    assert all(status in (0, 2) and "Traceback" not in err for _, err, status in ended), ended
    cards = [json.loads(out) for out, _, status in ended if status == 0]
    assert cards
    assert all("exists already" in err for _, err, status in ended if status == 2)
    written = json.loads((tmp_path / "data" / "card_x_16_123.json").read_text())
    assert written in cards
    for split in ("train", "val", "test"):
        assert open_samples(tmp_path / "data" / f"{split}_x_16_123").rows == written["splits"][split]["samples"]
    assert [path.name for path in (tmp_path / "data").iterdir() if "bertling" in path.name] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "t.txt").write_text("".join(f" = T{i} = \nthe old lamp was bright . \n" * 50 for i in range(20_000)))
    # A job in the background ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = begin(tmp_path / "t.txt", tmp_path / "data", "--workers", "2")
    signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("data/ids/.*bertling-tmp*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "leaked" not in err
    assert [path for path in tmp_path.rglob("*") if "bertling-tmp" in path.name] == []
