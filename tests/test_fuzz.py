"""Files damaged at random, or random altogether: thousands of them, and never a traceback or a hang.

`pytest tests/test_fuzz.py --hypothesis-profile thorough` tries many more.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from commands import TEXT, World, make_world
from hypothesis import example, given
from hypothesis import strategies as st

from bertling.checkpoint import load_checkpoint, load_state, read_tensors, verify
from bertling.files import BertlingError
from bertling.labelled import load_labelled
from bertling.runlog import read_metrics
from bertling.samples import open_samples
from bertling.settings import Settings, resolve
from bertling.text import read_pieces
from bertling.tokenizer import Tokenizer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PACKABLE = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


@st.composite
def damaged(draw: Callable[..., Any], raw: bytes) -> bytes:
    """`raw` with a few bits flipped, parts cut out, doubled or overwritten."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(["flip", "cut", "end", "double", "write"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + length]
            case "end":
                del data[at:]
            case "double":
                data[at:at] = data[at : at + length]
            case "write":
                data[at : at + length] = draw(st.binary(max_size=length))
    return bytes(data)


@st.composite
def altered(draw: Callable[..., Any], value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with some values replaced or left out, at any depth."""
    result = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place = result
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(JSON)
            else:
                del place[key]
            break
    return result


def harmless(action: Callable[[], Any]) -> None:
    """Whatever happens is fine, if it is an error of one line for the user."""
    said = ""
    try:
        action()
    except BertlingError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


INI = Settings(max_minutes=3.0, save_every="10m", run_id="x", case="a name").to_ini().encode()
INI_LINES = st.lists(
    st.tuples(st.sampled_from([line.split(" = ")[0] for line in INI.decode().splitlines()]), st.text(max_size=12)),
    max_size=6,
).map(lambda pairs: "\n".join(f"{key} = {value}" for key, value in pairs).encode(errors="replace"))


@given(raw=damaged(INI) | INI_LINES | st.binary(max_size=200))
@example(raw=b"save-every = 0m\n")
def test_settings_files(folder: Path, raw: bytes) -> None:
    path = folder / "config.ini"
    path.write_bytes(raw)
    harmless(lambda: resolve("pretrain", [path], {}))


ROWS = [[2, 5, 6, 7, 3, 0, 0, 0], [0, 5, 0, 0, 0, 0, 0, 0]] * 3


@given(
    raw=damaged(msgpack.packb(ROWS))
    | damaged(gzip.compress(msgpack.packb(ROWS), mtime=0))
    | PACKABLE.map(msgpack.packb)
    | st.binary(max_size=100),
)
@example(raw=b"\xdd\xff\xff\xff\xff" + b"\xdd\xff\xff\xff\xff" * 40)
def test_msgpack_files(folder: Path, raw: bytes) -> None:
    path = folder / "train_x_8_1.msgpack"
    path.write_bytes(raw)
    harmless(lambda: open_samples(path).fetch_labels(np.arange(1)))


def data_set(world: World) -> Path:
    return next(path for path in world.data.glob("val_*") if path.is_dir())


@given(data=st.data())
def test_manifests_of_data(world: World, folder: Path, data: st.DataObject) -> None:
    copy = folder / "data"
    if not copy.exists():
        shutil.copytree(data_set(world), copy)
    raw = (data_set(world) / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(
        data.draw(damaged(raw) | altered(json.loads(raw)).map(lambda v: json.dumps(v).encode()))
    )
    harmless(lambda: open_samples(copy).counts(400))


@given(data=st.data())
def test_files_of_checkpoints(world: World, folder: Path, data: st.DataObject) -> None:
    """Without a manifest, as in a folder from elsewhere: the checksums would find everything."""
    source, copy = (world.mlm / "checkpoints" / "last").resolve(), folder / "checkpoint"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("manifest.json"))
    name = data.draw(st.sampled_from(sorted(path.name for path in copy.iterdir())))
    raw = (copy / name).read_bytes()
    values = damaged(raw)
    if name.endswith(".json"):
        values |= altered(json.loads(raw)).map(lambda value: json.dumps(value).encode())
    if name.endswith(".safetensors"):
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        values |= altered(header).map(lambda value: with_header(value, raw[8 + size :]))
        values |= damaged(raw[: 8 + size]).map(lambda head: head + raw[8 + size :])
    (copy / name).write_bytes(data.draw(values))
    harmless(lambda: load_checkpoint(copy))
    harmless(lambda: load_state(copy))


def with_header(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


@given(raw=st.binary(max_size=64) | st.integers(0, 2**64 - 1).map(lambda size: size.to_bytes(8, "little") + b"{}"))
def test_safetensors_files(folder: Path, raw: bytes) -> None:
    (folder / "x.safetensors").write_bytes(raw)
    harmless(lambda: read_tensors(folder / "x.safetensors"))


@given(data=st.data())
def test_manifests_of_checkpoints(world: World, folder: Path, data: st.DataObject) -> None:
    source, copy = (world.mlm / "checkpoints" / "last").resolve(), folder / "verified"
    if not copy.exists():
        shutil.copytree(source, copy)
    raw = (source / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(
        data.draw(damaged(raw) | altered(json.loads(raw)).map(lambda v: json.dumps(v).encode()))
    )
    harmless(lambda: verify(copy, ours=True))


TABLE = b"sentence\tlabel\n" + b"".join(f"a text number {i}\t{i % 2}\n".encode() for i in range(6))
RECORDS = b"".join(json.dumps({"sentence": f"text {i}", "label": i % 2}).encode() + b"\n" for i in range(4))


@given(
    kind=st.sampled_from(["tsv", "csv", "jsonl", "tsv.gz"]),
    raw=damaged(TABLE)
    | damaged(TABLE.replace(b"\t", b","))
    | damaged(RECORDS)
    | damaged(gzip.compress(TABLE, mtime=0))
    | st.binary(max_size=100)
    | JSON.map(lambda value: json.dumps(value).encode()),
)
@example(kind="tsv", raw=b"\x1c")  # a blank for str, none for bytes
def test_labelled_tables(folder: Path, kind: str, raw: bytes) -> None:
    path = folder / f"train.{kind}"
    path.write_bytes(raw)
    harmless(lambda: load_labelled(path))


def parquet_bytes(tmp: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a", "b", None], "label": [0, 1, 1]}), tmp)
    return tmp.read_bytes()


@given(data=st.data())
def test_parquet_files(folder: Path, data: st.DataObject) -> None:
    raw = parquet_bytes(folder / "whole.parquet")
    path = folder / "train.parquet"
    path.write_bytes(data.draw(damaged(raw)))
    harmless(lambda: load_labelled(path))
    harmless(lambda: list(read_pieces([path])))


def test_a_column_whose_name_is_no_text(folder: Path) -> None:
    path = folder / "train.parquet"
    path.write_bytes(parquet_bytes(folder / "whole.parquet").replace(b"\x18\x08sentence", b"\x18\x08\xf3entence"))
    with pytest.raises(BertlingError, match="is not a readable parquet file"):
        load_labelled(path)


@given(data=st.data())
def test_vocabularies(world: World, folder: Path, data: st.DataObject) -> None:
    source = (world.mlm / "checkpoints" / "last").resolve()
    name = data.draw(st.sampled_from(["vocab.txt", "tokenizer.json", "tokenizer_config.json"]))
    copy = folder / "vocabulary"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for other in {"tokenizer.json"} if name == "tokenizer.json" else {"vocab.txt", name}:
        shutil.copy(source / other, copy)
    raw = (copy / name).read_bytes() if (copy / name).exists() else (source / name).read_bytes()
    values = damaged(raw)
    if name.endswith(".json"):
        values |= altered(json.loads(raw)).map(lambda value: json.dumps(value).encode())
    (copy / name).write_bytes(data.draw(values))
    harmless(lambda: Tokenizer.load(copy).encode("some words"))


@given(
    kind=st.sampled_from(["txt", "jsonl", "txt.gz", "txt.xz", "txt.zst"]),
    raw=damaged(TEXT.read_bytes()[:2000])
    | damaged(gzip.compress(b"some text\n" * 9, mtime=0))
    | st.binary(max_size=200),
)
def test_texts(folder: Path, kind: str, raw: bytes) -> None:
    path = folder / f"text.{kind}"
    path.write_bytes(raw)
    harmless(lambda: list(read_pieces([path])))


@given(raw=damaged(b'{"step": 1, "time": 0.1, "train/loss": 5.0}\n{"step": 2, "time": 0.2}\n') | st.binary(max_size=60))
def test_metrics_of_runs(folder: Path, raw: bytes) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "metrics.jsonl").write_bytes(raw)
    harmless(lambda: read_metrics(folder))
