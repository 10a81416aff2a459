"""Sample files: written and read back, and refused where they are damaged or hostile."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from static_files import write_msgpack

from bertling.files import BertlingError, atomic_folder
from bertling.packed import IGNORED, ROWS_PER_READ
from bertling.samples import MANIFEST, Samples, SamplesWriter, match_samples, open_samples, unigram_floors

SEQ_LEN = 8


def toy_rows(count: int, vocab_size: int = 50, seq_len: int = SEQ_LEN) -> np.ndarray:
    rows = np.random.default_rng(count).integers(5, vocab_size, (count, seq_len))
    rows[:, 0], rows[:, -1] = 2, 3
    return rows


def toy_folder(path: Path, rows: np.ndarray, vocab_size: int = 50, shard_bytes: int = 7 * SEQ_LEN * 2) -> Path:
    with atomic_folder(path) as folder:
        writer = SamplesWriter(folder, seq_len=rows.shape[1], vocab_size=vocab_size, pad_id=0, shard_bytes=shard_bytes)
        for start in range(0, len(rows), 5):
            writer.append(rows[start : start + 5])
        writer.finish(vocab_fingerprint="abc")
    return path


def toy_pairs(count: int, seq_len: int = SEQ_LEN) -> tuple[np.ndarray, np.ndarray]:
    ids = toy_rows(count, seq_len=seq_len)
    labels = np.where(np.random.default_rng(1).random(ids.shape) < 0.2, ids, IGNORED)
    return np.where(labels != IGNORED, 4, ids), labels


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_shards_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    rows = toy_rows(40, vocab_size)
    rows[3, 5:] = [3, 0, 0]
    samples = open_samples(toy_folder(tmp_path / "x", rows, vocab_size))
    manifest = json.loads((tmp_path / "x" / MANIFEST).read_text())
    assert manifest["dtype"] == dtype
    assert [shard["file"] for shard in manifest["shards"]][:2] == ["shard-00000.bin", "shard-00001.bin"]
    assert (samples.rows, samples.seq_len, samples.labels, samples.vocab_fingerprint) == (40, SEQ_LEN, False, "abc")
    order = np.random.default_rng(0).permutation(40)
    fetched = samples.fetch(order)
    assert fetched.dtype == np.int64
    assert (fetched == rows[order]).all()
    assert (samples.counts(vocab_size) == np.bincount(rows.reshape(-1), minlength=vocab_size)).all()
    assert (manifest["tokens"], manifest["padded_rows"]) == (40 * SEQ_LEN - 2, 1)
    with pytest.raises(IndexError, match="row out of range"):
        samples.fetch(np.array([40]))


def test_same_rows_give_the_same_bytes_however_they_are_appended(tmp_path: Path) -> None:
    rows = toy_rows(33)
    toy_folder(tmp_path / "a", rows)
    with atomic_folder(tmp_path / "b") as folder:
        writer = SamplesWriter(folder, seq_len=SEQ_LEN, vocab_size=50, pad_id=0, shard_bytes=7 * SEQ_LEN * 2)
        writer.append(rows)
        writer.finish(vocab_fingerprint="abc")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_writer_memory_does_not_grow(tmp_path: Path) -> None:
    def peak(blocks: int) -> int:
        block = toy_rows(256, seq_len=128)
        with atomic_folder(tmp_path / str(blocks)) as folder:
            writer = SamplesWriter(folder, seq_len=128, vocab_size=50, pad_id=0, shard_bytes=1 << 20)
            tracemalloc.start()
            for _ in range(blocks):
                writer.append(block)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            writer.finish(vocab_fingerprint="abc")
        return found

    assert peak(200) < 1.5 * peak(5)


@pytest.mark.parametrize("rows", [np.full((2, 5), 5), np.full((2, SEQ_LEN), 50), np.full((2, SEQ_LEN), -1)])
def test_writer_refuses_wrong_rows(tmp_path: Path, rows: np.ndarray) -> None:
    writer = SamplesWriter(tmp_path, seq_len=SEQ_LEN, vocab_size=50, pad_id=0)
    with pytest.raises(ValueError, match=r"rows of shape|ids outside of the vocabulary"):
        writer.append(rows)
    writer.close()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    path = toy_folder(tmp_path / "x", toy_rows(20))
    shard = path / "shard-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(BertlingError, match=r"shard-00001\.bin: has 110 bytes instead of 112"):
        open_samples(path)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BertlingError, match=r"shard-00001\.bin: damaged \(checksum differs"):
        open_samples(path)
    shard.unlink()
    with pytest.raises(BertlingError, match=r"shard-00001\.bin: this shard is missing"):
        open_samples(path)
    shard.write_bytes(whole)
    counts = path / "counts.bin"
    raw = counts.read_bytes()
    counts.write_bytes(raw[:-8])
    with pytest.raises(BertlingError, match=r"counts\.bin: damaged"):
        open_samples(path)
    counts.write_bytes(raw)
    with pytest.raises(BertlingError, match=r"does not hold the 51 counts"):
        open_samples(path).counts(51)
    (path / MANIFEST).unlink()
    with pytest.raises(BertlingError, match=r"not a prepared data set \(no manifest\.json in it\)"):
        open_samples(path)
    with pytest.raises(BertlingError, match=r"no such sample file or folder; make it with 'bertling prepare'"):
        open_samples(tmp_path / "nothing")


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update({name: value})


def _set_shard(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["shards"][0].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", 2), "'format' must be 1, not 2"),
        (_set("rows", -1), "'rows' must be an integer from 1"),
        (_set("rows", True), "'rows' must be an integer"),
        (_set("rows", 21), "says 21 rows, its shards hold 20"),
        (_set("seq_len", 10**30), "'seq_len' must be an integer from 3 to 1048576"),
        (_set("seq_len", 4), "has 112 bytes instead of 56"),
        (_set("seq_len", "8"), "'seq_len' must be an integer"),
        (_set("vocab_size", 1e9), "'vocab_size' must be an integer"),
        (_set("vocab_size", 1 << 40), "'vocab_size' must be an integer"),
        (_set("vocab_size", 20), "outside of its vocabulary of 20"),
        (_set("vocab_fingerprint", None), "'vocab_fingerprint' must be a text"),
        (_set("dtype", "object"), "'dtype' must be uint16 or uint32"),
        (_set("shards", {"a": 1}), "'shards' must be a list of objects"),
        (_set("shards", ["shard-00000.bin"]), "'shards' must be a list of objects"),
        (_set("shards", []), "says 20 rows, its shards hold 0"),
        (_set_shard("file", "../x/shard-00000.bin"), "a shard's 'file' must look like shard-00000.bin"),
        (_set_shard("file", "/etc/passwd"), "a shard's 'file' must look like shard-00000.bin"),
        (_set_shard("file", 3), "a shard's 'file' must look like shard-00000.bin"),
        (_set_shard("rows", -7), "'rows' must be an integer from 1"),
        (_set_shard("rows", 10**18), "'rows' must be an integer from 1"),
        (_set_shard("sha256", None), "damaged"),
    ],
)
def test_hostile_manifests_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    path = toy_folder(tmp_path / "x", toy_rows(20))
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BertlingError, match=message) as caught:
        open_samples(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.msgpack", "x.msgpack.gz"])
def test_msgpack_round_trip(tmp_path: Path, name: str) -> None:
    count = ROWS_PER_READ + 10
    ids, labels = toy_pairs(count)
    write_msgpack(tmp_path / name, [(ids[:7], labels[:7]), (ids[7:], labels[7:])], count)
    samples = open_samples(tmp_path / name)
    assert (samples.rows, samples.seq_len, samples.labels, samples.vocab_fingerprint) == (count, SEQ_LEN, True, None)
    order = np.random.default_rng(0).permutation(count)
    assert (samples.fetch(order) == ids[order]).all()
    assert (samples.fetch_labels(order) == labels[order]).all()
    assert (samples.fetch_originals(order) == toy_rows(count)[order]).all()
    assert samples.max_id == 49
    assert samples.max_masked == (labels != IGNORED).sum(axis=1).max()
    assert (samples.counts(50) == np.bincount(toy_rows(count).reshape(-1), minlength=50)).all()


def test_msgpack_is_the_plain_layout(tmp_path: Path) -> None:
    ids, labels = toy_pairs(6)
    write_msgpack(tmp_path / "x.msgpack.gz", [(ids, labels)], 6)
    raw = (tmp_path / "x.msgpack.gz").read_bytes()
    values = msgpack.unpackb(gzip.decompress(raw))
    assert values[0::2] == ids.tolist()
    assert values[1::2] == np.where(labels == IGNORED, 0, labels).tolist()
    assert raw[4:8] == bytes(4), "no time in the header, so that the same samples give the same bytes"


def test_msgpack_writer_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    ids, labels = toy_pairs(3)
    with pytest.raises(ValueError, match="2 rows fewer than announced"):
        write_msgpack(tmp_path / "x.msgpack", [(ids, labels)], 5)
    labels[0, 1] = 0
    with pytest.raises(ValueError, match="a masked id 0"):
        write_msgpack(tmp_path / "x.msgpack", [(ids, labels)], 3)
    assert list(tmp_path.iterdir()) == []


GOOD = [2, 7, 9, 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"ids": GOOD}, "not a msgpack array of lists of integers"),
        (b"text", "not a msgpack array of lists of integers"),
        ([], "holds no samples"),
        ([GOOD, GOOD, GOOD], "holds 3 lists; ids and labels must come in pairs"),
        ([GOOD, [0, 7, 0]], "its rows differ in length"),
        ([GOOD, GOOD, GOOD[:3], GOOD[:3]], "its rows differ in length"),
        ([[2, 3], [0, 0]], "at least 3 integers"),
        ([[], []], "at least 3 integers"),
        ([GOOD, 5], "must hold lists of integers, found a int"),
        ([GOOD, [0, 1.5, 0, 0]], "must be integers"),
        ([GOOD, [0, None, 0, 0]], "must be integers"),
        ([GOOD, [0, [1], 0, 0]], "must be plain integers"),
        ([[GOOD, GOOD, GOOD], [GOOD, GOOD, GOOD]], "at least 3 integers"),
        ([GOOD, [0, "a", 0, 0]], "not a msgpack array of lists of integers"),
        ([[2, -1, 9, 3], [0, 0, 0, 0]], "must lie between 0 and"),
        ([[2, 2**63, 9, 3], [0, 0, 0, 0]], "must be integers"),
        ([[2, 2**40, 9, 3], [0, 0, 0, 0]], "must lie between 0 and"),
        ([GOOD, {"a": 1}], "not a msgpack array of lists of integers"),
    ],
)
@pytest.mark.parametrize("name", ["x.msgpack", "x.msgpack.gz"])
def test_wrong_msgpack_is_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    raw = msgpack.packb(value)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(BertlingError, match=message) as caught:
        open_samples(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_damaged_msgpack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.msgpack.gz"
    ids, labels = toy_pairs(500)
    write_msgpack(path, [(ids, labels)], 500)
    raw = path.read_bytes()
    plain = gzip.decompress(raw)
    for damaged, message in [
        (raw[: len(raw) // 2], "ends too early"),
        (raw[:200] + bytes(50) + raw[250:], "ends too early|not a msgpack array"),
        (plain[: len(plain) // 2], "ends too early"),
        (b"\xdd\xff\xff\xff\xfe" + plain[5:], "ends too early"),
        (plain + b"\x01", "goes on after its array"),
        (b"", "ends too early"),
        (b"\x00hello", "not a msgpack array"),
        (b"\x91" * 5000, "holds 1 lists"),
        (b"\x92" + b"\x91" * 5000, "not a msgpack array"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(BertlingError, match=message):
            open_samples(path)


def _touch(base: Path, *names: str) -> None:
    (base / "datasets").mkdir(exist_ok=True)
    for name in names:
        path = base / "datasets" / name
        if name.endswith((".msgpack", ".gz", ".json", ".parquet")):
            path.touch()
        else:
            path.mkdir()
            (path / MANIFEST).touch()


def test_patterns(tmp_path: Path) -> None:
    _touch(tmp_path, "train_w_128_9.msgpack.gz", "train_w_128_10.msgpack", "train_w_128_10.msgpack.gz", "train_w_128_1")
    _touch(tmp_path, "train_w_128_9", "val_w_128_9", ".train_w_128_7.tmp", "card_w_128_9.json", "train.parquet")
    _touch(tmp_path, "train_w_128_12.csv.gz")  # a table
    (tmp_path / "datasets" / "train_w_128_11").mkdir()  # not prepared: no manifest in it

    def names(pattern: str) -> list[str]:
        return [path.name for path in match_samples(tmp_path, pattern)]

    assert names("train_w_128_*.msgpack") == ["train_w_128_1", "train_w_128_9.msgpack.gz", "train_w_128_10.msgpack"]
    assert names("train_w_128_9.msgpack") == ["train_w_128_9.msgpack.gz"]
    assert names("val_w_128_*.msgpack") == ["val_w_128_9"]
    assert names("train_w_128_*.msgpack.gz")[2] == "train_w_128_10.msgpack.gz"
    assert names("train_w_128_*") == ["train_w_128_1", "train_w_128_9", "train_w_128_10.msgpack"]
    assert names("*/") == names("*")


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match=r"pattern 'x\*': matches nothing in .*no data set is there"):
        match_samples(tmp_path, "x*")
    _touch(tmp_path, *(f"train_{i}" for i in range(10)), "notes.json")
    with pytest.raises(BertlingError, match=r"there is: train_0, .*train_7 and 2 more"):
        match_samples(tmp_path, "x*.msgpack")
    for pattern in ("", "/etc/*"):
        with pytest.raises(BertlingError, match="must be a relative pattern"):
            match_samples(tmp_path, pattern)
    with pytest.raises(BertlingError, match="not a valid pattern"):
        match_samples(tmp_path, "a**b")


def test_floors() -> None:
    train = np.array([100, 100, 0, 0, 0, 6, 2, 0])
    scored = np.array([9, 9, 0, 0, 0, 1, 3, 0])
    floors = unigram_floors(train, scored, (0, 1, 2, 3, 4))
    assert floors.accuracy == 0.25
    assert floors.entropy == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert floors.cross_entropy == pytest.approx(-(np.log(7 / 11) + 3 * np.log(3 / 11)) / 4)
    assert unigram_floors(train, np.zeros_like(train), (0,)).accuracy == 0.0


def test_samples_are_frozen(tmp_path: Path) -> None:
    samples: Samples = open_samples(toy_folder(tmp_path / "x", toy_rows(20)))
    with pytest.raises(ValueError, match="read-only"):
        samples.blocks[0][0, 0] = 1
