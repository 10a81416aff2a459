"""Fetching from a hub: a small server on 127.0.0.1 speaks its protocol, breaks off, and refuses."""

import errno
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest
from commands import Ended, bertling

import bertling as package
from bertling.files import BertlingError
from bertling.tools.download import download as fetch
from bertling.tools.download import endpoint

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
utils = pytest.importorskip("huggingface_hub.utils")

BOX = {name: (Path(package.__file__).parent / "box" / name).read_bytes() for name in ("config.json", "vocab.txt")}
SHA = "1f0c4e8a9b7d6c5e4f3a2b1c0d9e8f7a6b5c4d3e"
REPOS: dict[str, dict[str, bytes]] = {
    "datasets/stanfordnlp/sst2": {
        "data/train-00000-of-00001.parquet": bytes(range(256)) * 50_000,
        "data/validation-00000-of-00001.parquet": b"validation" * 100,
        "README.md": b"not wanted",
    },
    "models/someone/tiny-bert": {
        "config.json": b"{}",
        "model.safetensors": b"weights" * 1000,
        "pytorch_model.bin": b"the same in an older form",
        "vocab.txt": b"[PAD]\n",
        "onnx/model.onnx": b"for another program",
    },
    "models/someone/empty": {"picture.png": b"png"},
    "models/someone/modern": BOX,
    "models/someone/electra": BOX | {"config.json": BOX["config.json"].replace(b'"modernbert"', b'"electra"')},
}
GATED = "models/someone/gated"


class Hub(ThreadingHTTPServer):
    """What was asked of it is in `log`; it breaks off so many answers with files after `break_after` bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log: list[tuple[str, str, str | None]] = []
        self.break_after, self.breaks = 11_000_000, 0
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.log.append((self.command, path, self.headers.get("Range")))
        if "/tree/" in path:
            kind, _, name = path.removeprefix("api/").partition("/tree/")[0].partition("/")
            files = REPOS[f"{kind}/{name}"]
            tree = [{"type": "file", "path": at, "size": len(x), "oid": digest(x)} for at, x in files.items()]
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path.startswith("api/"):
            self.about(path.removeprefix("api/").partition("/revision/")[0])
        else:
            where, _, rest = path.partition("/resolve/")
            repo = where if where.startswith("datasets/") else f"models/{where}"
            self.file(REPOS[repo][rest.partition("/")[2]], body=body)

    def about(self, repo: str) -> None:
        kind, _, name = repo.partition("/")
        files = REPOS.get(f"{kind}/{name}")
        if files is None:
            code = "GatedRepo" if repo == GATED else "RepoNotFound"
            self.reply(403 if repo == GATED else 404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
            return
        siblings = [{"rfilename": path, "size": len(data), "blobId": digest(data)} for path, data in files.items()]
        info = {
            "id": name,
            "sha": SHA,
            "private": False,
            "tags": ["license:mit"],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "cardData": {"license": "cc-by-4.0"} if kind == "datasets" else None,
        }
        self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def file(self, data: bytes, *, body: bool) -> None:
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = 0
        if (asked := self.headers.get("Range")) and body:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and self.server.breaks and len(data) - start > self.server.break_after:
            self.server.breaks -= 1
            self.send_response(206 if start else 200)
            for key, value in (headers | {"Content-Length": str(len(data) - start)}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[start : start + self.server.break_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.reply(206 if start else 200, data[start:], headers, body=body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub's library reads its settings when it is imported: what counts is set again, and no try waits."""
    home = tmp_path / "home"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # its own handler holds on to a standard error that may be closed by now; this one takes the present one
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [logging.lastResort])
    close_session = getattr(huggingface_hub, "close_session", lambda: None)
    close_session()
    utils.disable_progress_bars()
    yield
    utils.enable_progress_bars()
    close_session()


def download(hub: str, folder: Path, *words: str) -> Ended:
    with mock.patch.dict(os.environ, HF_ENDPOINT=hub):
        return bertling("download", *words, cwd=folder)


def download_apart(hub: str, folder: Path, *words: str) -> Ended:
    """In a process of its own, as a user does it."""
    settings = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }
    command = [sys.executable, "-m", "bertling", "download", *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=100
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_data_set_with_its_size_and_licence_first(hub: Hub, tmp_path: Path) -> None:
    ended = download_apart(hub.endpoint, tmp_path, "sst2", "-o", "data sets", "--json")
    assert ended.status == 0, ended.err
    first = ended.err.splitlines()[0]
    assert first == f"stanfordnlp/sst2 (dataset, revision {SHA[:12]}): 2 files, 12.8 MB; licence: cc-by-4.0"
    answer = json.loads(ended.out)
    assert answer["folder"] == "data sets"
    for path, data in REPOS["datasets/stanfordnlp/sst2"].items():
        here = tmp_path / "data sets" / path
        assert (here.read_bytes() == data) if path.startswith("data/") else not here.exists()
    asked = len(hub.log)
    again = download(hub.endpoint, tmp_path, "sst2", "-o", "data sets")
    assert again.status == 0, again.err
    assert "next: bertling finetune --cp RUN --train-input data sets/data/train" in again.out
    assert [path for method, path, _ in hub.log[asked:] if method == "GET" and "resolve" in path] == []


def test_a_model_without_its_second_copies(hub: Hub, tmp_path: Path) -> None:
    ended = download(hub.endpoint, tmp_path, "someone/tiny-bert")
    assert ended.status == 0, ended.err
    assert "3 files" in ended.err.splitlines()[0]
    assert "licence: mit" in ended.err.splitlines()[0]
    found = sorted(path.name for path in (tmp_path / "tiny-bert").iterdir() if path.name != ".cache")
    assert found == ["config.json", "model.safetensors", "vocab.txt"]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("modern", "bertling finetune --cp modern"),
        ("electra", "it cannot be used here: config.json: model_type = 'electra' is not supported"),
    ],
)
def test_the_next_step_is_one_that_can_be_taken(hub: Hub, tmp_path: Path, name: str, step: str) -> None:
    ended = download(hub.endpoint, tmp_path, f"someone/{name}")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1].startswith(f"next: {step}")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = 1
    ended = download(hub.endpoint, tmp_path, "sst2")
    assert ended.status == 0, ended.err
    path = "data/train-00000-of-00001.parquet"
    assert (tmp_path / "sst2" / path).read_bytes() == REPOS["datasets/stanfordnlp/sst2"][path]
    ranges = [asked for method, _, asked in hub.log if method == "GET" and asked]
    assert len(ranges) == 1  # from the last whole piece of 10 MiB on
    assert int(ranges[0].removeprefix("bytes=").removesuffix("-")) > 10_000_000


def test_the_same_command_again_fetches_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    hub.breaks, hub.break_after = 100, 10_000
    broken = download(hub.endpoint, tmp_path, "sst2")
    assert broken.status == 2
    assert "run the same command again to go on" in broken.err.splitlines()[-1]
    path = "data/train-00000-of-00001.parquet"
    assert not (tmp_path / "sst2" / path).exists()
    hub.breaks = 0
    (tmp_path / "sst2" / "data").mkdir(parents=True, exist_ok=True)
    have = {one.name for one in (tmp_path / "sst2" / "data").iterdir()}
    asked = len(hub.log)
    whole = download(hub.endpoint, tmp_path, "sst2")
    assert whole.status == 0, whole.err
    assert (tmp_path / "sst2" / path).read_bytes() == REPOS["datasets/stanfordnlp/sst2"][path]
    fetched = {Path(at).name for method, at, _ in hub.log[asked:] if method == "GET" and "/resolve/" in at}
    assert not have & fetched


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext", "error: wikitext: neither one of wikitext-103, sst2 nor a model's name as OWNER/NAME"),
        ("foo bar/baz", "error: foo bar/baz: no name that the hub allows"),
        ("someone/nothing", "error: someone/nothing: no such model on http://127"),
        ("someone/gated", "error: someone/gated: asks for your consent first"),
        ("someone/empty", "error: someone/empty: holds none of config.json"),
    ],
)
def test_refusals_in_one_line(hub: Hub, tmp_path: Path, name: str, message: str) -> None:
    ended = download(hub.endpoint, tmp_path, name)
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith(message)
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("notes.txt", "notes.txt: is a file; give a folder for the download"),
        ("notes.txt/deeper", r"\S*notes.txt/deeper\S*: a part of this path is a file, not a folder: .*"),
        ("taken", r"\S*taken/data: a file of this name is in the way: choose another path"),
    ],
)
def test_a_file_in_the_way_is_named(hub: Hub, tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "taken").mkdir()
    for name in ("notes.txt", "taken/data"):
        (tmp_path / name).write_text("mine")
    ended = download(hub.endpoint, tmp_path, "sst2", "-o", output)
    assert ended.status == 2
    assert re.fullmatch(f"error: {message}", ended.err.splitlines()[-1])
    assert "Traceback" not in ended.err
    assert (hub.log == []) == (output == "notes.txt"), "what cannot be is refused before the hub is asked"


@pytest.mark.parametrize(
    ("file", "named"), [("m/config.json", "m/config.json: "), (None, r"m, or the hub's cache \(HF_HOME\): ")]
)
def test_a_full_disk_is_no_lost_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, named: str
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", file)

    entry = SimpleNamespace(rfilename="config.json", size=2)
    info = SimpleNamespace(sha=SHA, siblings=[entry], card_data=None, tags=[])
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *args, **options: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BertlingError, match=f"^{named}the disk is full: free some space, then run the same command"):
        fetch("someone/m", None, lambda text: None)


def test_the_hub_is_the_librarys_own_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert endpoint() == constants.ENDPOINT
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    assert endpoint() == "http://127.0.0.1:9"


def test_offline_it_says_what_to_place_where(tmp_path: Path) -> None:
    ended = download("http://127.0.0.1:9", tmp_path, "wikitext-103")
    assert ended.status == 2
    line = ended.err.splitlines()[-1]
    assert "could not be reached" in line
    assert "place these files by hand: wikitext-103-raw-v1/*.parquet of Salesforce/wikitext in wikitext-103" in line
    assert "Traceback" not in ended.err


def test_an_address_that_is_none_is_one_line(tmp_path: Path) -> None:
    ended = download_apart("http://[", tmp_path, "sst2")
    assert (ended.status, ended.err) == (
        2,
        "error: HF_ENDPOINT: is no address (Invalid IPv6 URL); correct it, or unset it\n",
    )


@pytest.mark.parametrize("said", [b"<html>log in first</html>", b"[1, 2]", b"{}"])
def test_whoever_answers_in_the_place_of_the_hub_is_no_hub(said: bytes, tmp_path: Path) -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *words: object) -> None:
            """In silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        ended = download(f"http://127.0.0.1:{server.server_port}", tmp_path, "sst2")
    finally:
        server.shutdown()
    assert ended.status == 2
    assert "could not be reached or broke off" in ended.err.splitlines()[-1]
