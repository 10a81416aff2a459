"""Files made to harm: nothing is executed, nothing is allocated on a file's word, no path leads out, nothing unpacks
without end, and no connection is made."""

import gzip
import json
import lzma
import pickle
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from commands import VOCAB, World, bertling, make_world
from safetensors.torch import load_file, save_file

from bertling import files, tables, text, tokenizer
from bertling.checkpoint import load_checkpoint
from bertling.files import BertlingError
from bertling.finetune import FinetuneResult
from bertling.inference import load
from bertling.labelled import load_labelled
from bertling.runs import Outcome
from bertling.text import read_pieces
from bertling.tokenizer import Tokenizer
from bertling.tools.export import export


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "executed"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture
def model(world: World, tmp_path: Path) -> Path:
    """A model folder from elsewhere: without a manifest."""
    folder = tmp_path / "model"
    shutil.copytree(
        (world.mlm / "checkpoints" / "last").resolve(),
        folder,
        ignore=shutil.ignore_patterns("manifest.json", "training_state*"),
    )
    return folder


def test_no_pickle_is_opened_whatever_it_is_called(model: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    payload = pickle.dumps(Bomb(proof))
    pickle.loads(payload)
    assert proof.read_text() == "executed"  # it would
    proof.unlink()
    weights = model / "model.safetensors"
    for path, message in (
        (weights, r"model\.safetensors: damaged or truncated"),
        (model / "pytorch_model.bin", r"pytorch_model\.bin: damaged, or holds more than tensors"),
    ):
        weights.unlink()
        path.write_bytes(payload)
        with pytest.raises(BertlingError, match=message):
            load_checkpoint(model)
        torch.save({"weight": Bomb(proof)}, path)
        with pytest.raises(BertlingError, match=message):
            load_checkpoint(model)
    data = tmp_path / "train_x_16_1.msgpack"
    data.write_bytes(payload)
    assert "train_x_16_1.msgpack" in bertling("inspect", data, "-v", VOCAB).error
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_an_old_weights_file_gives_the_same_model(model: Path, zipped: bool) -> None:
    before = load_checkpoint(model).model.state_dict()
    weights = model / "model.safetensors"
    old = model / "pytorch_model.bin"
    torch.save(load_file(weights), old, _use_new_zipfile_serialization=zipped)
    weights.unlink()
    after = load_checkpoint(model).model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    whole = old.read_bytes()
    for raw in (whole[: len(whole) // 2], b"", b"no weights at all", whole[: len(whole) // 2] + bytes(64)):
        old.write_bytes(raw)
        with pytest.raises(BertlingError, match=r"pytorch_model\.bin: damaged, or holds more than tensors"):
            load_checkpoint(model)
    torch.save([torch.zeros(3)], old)
    with pytest.raises(BertlingError, match=r"pytorch_model\.bin: holds no table of tensors"):
        load_checkpoint(model)
    old.unlink()
    with pytest.raises(BertlingError, match=r"model\.safetensors: missing"):
        load_checkpoint(model)


def test_weights_in_several_files(world: World, tmp_path: Path) -> None:
    model, checkpoint = tmp_path / "model", world.mlm / "checkpoints" / "best"
    shutil.copytree(checkpoint, model)
    (model / "manifest.json").unlink()
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    keys = sorted(weights)
    places = {key: f"part-{place % 2}.safetensors" for place, key in enumerate(keys)}
    for name in set(places.values()):
        save_file({key: weights[key] for key in keys if places[key] == name}, model / name)
    index = model / "model.safetensors.index.json"

    index.write_text(json.dumps({"weight_map": places}))
    before = load_checkpoint(checkpoint).model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in load_checkpoint(model).model.state_dict().items())
    for bad, says in (
        ({}, "does not say which file holds which weight"),
        ({"weight_map": places | {keys[0]: 3}}, "does not say which file holds which weight"),
        ({"weight_map": places | {keys[0]: f"../model/{places[keys[0]]}"}}, "which does not lie in its folder"),
        ({"weight_map": places | {keys[0]: places[keys[1]]}}, f"{keys[0]} is not in {places[keys[1]]}"),
        ({"weight_map": places | {keys[0]: "gone.safetensors"}}, "gone.safetensors: missing"),
    ):
        index.write_text(json.dumps(bad))
        with pytest.raises(BertlingError, match=re.escape(says)):
            load_checkpoint(model)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -32},
        {"hidden_size": 2**40},
        {"hidden_size": 2**14, "vocab_size": 2**22, "num_hidden_layers": 2**9},  # each within its limit: 2^45 weights
        {"vocab_size": 10**15},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"intermediate_size": 2**17},
        {"max_position_embeddings": -1},
        {"hidden_size": "32"},
        {"hidden_size": 1e300},
        {"norm_eps": "nan"},
        {"id2label": {str(i): "x" for i in range(3)}},
        {"id2label": {"0": ["a"], "1": {}}},
    ],
)
def test_sizes_are_believed_only_where_the_weights_agree(model: Path, change: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    began = time.monotonic()
    with pytest.raises(BertlingError, match=r"^[^\n]*config\.json[^\n]*$"):
        load_checkpoint(model)
    assert time.monotonic() - began < 5


def test_json_that_is_too_deep_or_too_large(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(BertlingError, match=r"config\.json: this model configuration is not valid JSON"):
        load_checkpoint(model)
    monkeypatch.setattr(files, "MOST_JSON", 1 << 20)
    (model / "config.json").write_text('{"x": "' + "x" * (1 << 20) + '"}')
    with pytest.raises(BertlingError, match=r"config\.json: larger than 1 MiB, which no such file is"):
        load_checkpoint(model)


def test_a_vocabulary_without_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_MOST_BYTES", 1 << 20)
    (model / "vocab.txt").write_text("x" * (2 << 20))
    with pytest.raises(BertlingError, match=r"vocab\.txt: larger than 1 MiB"):
        Tokenizer.load(model)


def test_names_do_not_lead_out_of_a_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words of a text\n" * 99)
    line = bertling("prepare", "-i", "text.txt", "-l", "../out", "-o", "data", "-v", VOCAB).error
    assert "label: '../out' must be letters" in line
    for name in ("../out", "/tmp/out", ".."):
        assert "run-id" in bertling("pretrain", "--base-dir", world.base, "--run-id", name).error
    data = tmp_path / "train_x"
    shutil.copytree(next(path for path in world.data.glob("train_*") if path.is_dir()), data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../../shard-00000.bin"
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert "a shard's 'file' must look like shard-00000.bin" in bertling("inspect", data).error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "train_x"]


@pytest.mark.parametrize("packing", ["gz", "xz", "zst"])
def test_a_small_file_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    monkeypatch.setattr(text, "_BOMB_BYTES", 4 << 20)
    endless = b"word " * (8 << 20)
    path = tmp_path / f"bomb.txt.{packing}"
    if packing == "zst":
        path.write_bytes(pyarrow.compress(endless, codec="zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(endless, 9) if packing == "gz" else lzma.compress(endless, preset=0))
    seen = 0

    def read_all() -> None:
        nonlocal seen
        for piece in read_pieces([path]):
            seen += len(piece.text)

    with pytest.raises(BertlingError, match=rf"bomb\.txt\.{packing}: unpacks to more than 200 times its size: no text"):
        read_all()
    assert seen < 8 << 20


def test_real_text_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_BOMB_BYTES", 0)
    body = (Path(__file__).parent / "assets" / "tiny.txt").read_bytes()
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(body * 20))
    assert sum(len(piece.text) for piece in read_pieces([path])) > len(body)


def test_labelled_texts_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_BYTES", 1 << 20)
    (tmp_path / "bomb.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\n" + b"word " * (1 << 20)))
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40_000), pyarrow.array(["word " * 1000]))
    pyarrow.parquet.write_table(
        pyarrow.table({"sentence": texts.cast(pyarrow.string()), "label": [0] * 40_000}), tmp_path / "bomb.parquet"
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    for name in ("bomb.tsv.gz", "bomb.parquet"):
        with pytest.raises(
            BertlingError, match=rf"{name}: holds more than 1 MiB of labelled texts; give a part of them"
        ):
            load_labelled(tmp_path / name)


def test_nothing_asks_a_network(
    work: Path,
    train_mlm: Callable[..., Outcome],
    train_classifier: Callable[..., FinetuneResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def refuse(*given: object, **more: object) -> None:
        asked.append(given)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    with pytest.raises(OSError, match="no network here"):
        socket.create_connection(("127.0.0.1", 9))
    asked.clear()
    run = train_mlm(max_iters=2).run
    train_classifier(cp=run, max_iters=2)
    load(run).fill("the old [MASK] .")
    load(task="classify").classify("a lovely river")
    export(run, work / "exported", "hf")  # compares with the stock classes
    assert asked == []
