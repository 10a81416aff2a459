"""Text to ids: equal for any number of workers, cached, nothing half-written, duplicates counted and dropped."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertling import corpus as corpus_module
from bertling.corpus import Corpus, build_corpus
from bertling.files import BertlingError
from bertling.text import TextOptions, iter_documents
from bertling.tokenizer import SPECIAL_TOKENS, Tokenizer

ASSETS = Path(__file__).parent / "assets"
TINY = ASSETS / "tiny.txt"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ASSETS / "vocab")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")}


def texts_of(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(corpus.ids[start:stop].tolist()) for start, stop in pairwise(corpus.documents.tolist())]


def test_ids_are_the_tokenizers_in_reading_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = build_corpus([TINY], tokenizer, tmp_path)
    expected = [tokenizer.encode(piece.text) for piece in iter_documents([TINY])]
    assert corpus.documents.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert corpus.ids.tolist() == [index for ids in expected for index in ids]
    assert corpus.ids.dtype == np.dtype("<u2")
    assert corpus.pieces is None
    assert corpus.vocab_fingerprint == tokenizer.fingerprint
    lines = [line for line in TINY.read_text().split("\n") if line.strip()]
    assert corpus.stats == corpus.stats | {
        "documents": 8,
        "lines": len(lines),
        "characters": len(TINY.read_text()),
        "tokens": len(corpus.ids),
        "unk_tokens": corpus.ids.tolist().count(tokenizer.unk_id),
        "duplicate_documents": 0,
        "duplicate_lines": 0,
        "dropped_documents": 0,
        "dropped_lines": 0,
        "inputs": 1,
        "input_bytes": TINY.stat().st_size,
    }
    assert corpus.stats["seconds"] > 0


def test_segments_are_cut_every_four_characters_a_token_within_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = build_corpus([TINY], tokenizer, tmp_path, method="segment", seq_len=32)
    expected, ends = [], [0]
    for piece in iter_documents([TINY]):
        for start in range(0, len(piece.text), 120):
            ids = tokenizer.encode(piece.text[start : start + 120])
            expected += ids
            ends += [len(expected)] if ids else []
    assert corpus.pieces is not None
    assert corpus.ids.tolist() == expected
    assert corpus.pieces.tolist() == ends
    assert set(corpus.documents.tolist()) <= set(ends)


@pytest.mark.parametrize("how", [{}, {"drop_duplicates": True}, {"method": "segment", "seq_len": 128}])
def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", 700)
    built = [build_corpus([TINY, TINY], tokenizer, tmp_path / str(n), workers=n, **how) for n in (1, 3)]
    assert built[0].folder.name == built[1].folder.name
    assert contents(built[0].folder) == contents(built[1].folder)
    assert contents(built[0].folder)
    assert built[0].stats | {"seconds": 0} == built[1].stats | {"seconds": 0}


def test_a_second_call_reads_no_text_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_corpus([TINY], tokenizer, tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("the text was read again")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "read_pieces", fail)
        again = build_corpus([TINY], tokenizer, tmp_path, workers=2)
        assert again.folder == first.folder
        assert again.stats == first.stats
        assert again.ids.tolist() == first.ids.tolist()
        # The name of a file does not matter, what it holds does.
        copy = tmp_path / "copy.tokens"
        copy.write_bytes(TINY.read_bytes())
        assert build_corpus([copy], tokenizer, tmp_path).folder == first.folder
    others = [
        build_corpus([TINY], Tokenizer(tokenizer.entries, lowercase=False), tmp_path),
        build_corpus([TINY], tokenizer, tmp_path, options=TextOptions(clean=True)),
        build_corpus([TINY], tokenizer, tmp_path, method="segment", seq_len=16),
        build_corpus([TINY], tokenizer, tmp_path, method="segment", seq_len=32),
        build_corpus([TINY], tokenizer, tmp_path, drop_duplicates=True),
        build_corpus([TINY, copy], tokenizer, tmp_path),
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 7


@pytest.mark.parametrize("damage", ["shorter", "other", "missing", "manifest"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, tokenizer: Tokenizer, damage: str) -> None:
    folder = build_corpus([TINY], tokenizer, tmp_path).folder
    good = contents(folder)
    if damage == "shorter":
        (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-2])
    elif damage == "other":
        raw = bytearray((folder / "ids.bin").read_bytes())
        raw[40] ^= 1
        (folder / "ids.bin").write_bytes(raw)
    elif damage == "missing":
        (folder / "documents.bin").unlink()
    else:
        (folder / "corpus.json").write_text("{")
    assert contents(build_corpus([TINY], tokenizer, tmp_path).folder) == good


def test_duplicates_are_counted_and_dropped_on_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.txt"
    source.write_text(
        " = A = \n\nthe sea\nthe river\n = B = \nthe kite\nthe sea\n\n\n"
        " = A = \nthe sea\nthe river\n = C = \nthe wind\n"
    )
    kept = build_corpus([source], tokenizer, tmp_path)
    counted = {"duplicate_documents": 1, "duplicate_lines": 4}
    assert kept.stats == kept.stats | counted | {"documents": 4, "lines": 11, "dropped_lines": 0}
    dropped = build_corpus([source], tokenizer, tmp_path, drop_duplicates=True)
    assert dropped.stats == dropped.stats | counted | {
        "documents": 3,
        "lines": 7,
        "dropped_lines": 4,
        "dropped_documents": 1,
        "tokens": len(dropped.ids),
    }
    assert texts_of(dropped, tokenizer) == ["= a = the sea the river", "= b = the kite", "= c = the wind"]


def test_documents_that_span_pieces_are_whole_and_compared_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    body = "".join(f"the kite {number}\n" for number in range(80_000))
    sources = [tmp_path / f"{name}.txt" for name in "abc"]
    for source, text in zip(sources, (body, body + "end", body), strict=True):
        source.write_text(text)
    corpus = build_corpus(sources, tokenizer, tmp_path, workers=2)
    assert corpus.stats["documents"] == 3
    assert corpus.stats["duplicate_documents"] == 1
    assert corpus.stats["duplicate_lines"] == 2 * 80_000
    lengths = np.diff(corpus.documents)
    assert lengths[0] == lengths[2] < lengths[1]


def test_documents_without_tokens_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the sea", "\u00e9\u00e9", "a kite")))
    corpus = build_corpus([source], tokenizer, tmp_path, options=TextOptions(clean=True))
    assert texts_of(corpus, tokenizer) == ["the sea", "a kite"]
    assert (corpus.stats["documents"], corpus.stats["dropped_documents"]) == (2, 1)


def test_wikitext_unknowns_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.tokens"
    source.write_text(" = A = \n <unk> the sea , <unk> \n")
    corpus = build_corpus([source], tokenizer, tmp_path)
    assert texts_of(corpus, tokenizer) == ["= a = [UNK] the sea , [UNK]"]
    assert corpus.stats["unk_tokens"] == 2
    assert corpus.stats["documents"] == 1


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("w65530 w1")
    big = Tokenizer([*SPECIAL_TOKENS, *(f"w{number}" for number in range(65_531))])
    corpus = build_corpus([source], big, tmp_path)
    assert corpus.ids.dtype == np.dtype("<u4")
    assert corpus.ids.tolist() == [65_535, 6]


@pytest.mark.parametrize("drop", [False, True])
def test_progress_rises_to_the_total(tmp_path: Path, tokenizer: Tokenizer, drop: bool) -> None:
    calls: list[tuple[int, int]] = []
    build_corpus([TINY, TINY], tokenizer, tmp_path, drop_duplicates=drop, progress=lambda *call: calls.append(call))
    total = TINY.stat().st_size * (4 if drop else 2)
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty: there is no text in it"),
        (b"the kite\n" * 300_000 + b"\xff", "line 300001: not UTF-8 text"),
        (b"\xcc\x81\n" * 3, "no token comes out of this text"),
    ],
)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, data: bytes, message: str, workers: int
) -> None:
    source = tmp_path / "bad.txt"
    source.write_bytes(data)
    with pytest.raises(BertlingError, match=message) as caught:
        build_corpus([source], tokenizer, tmp_path / "cache", workers=workers)
    assert str(source) in str(caught.value)
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_module, "_int64", fail)
    with pytest.raises(BertlingError, match="the disk is full: free some space"):
        build_corpus([TINY], tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []


def test_calls_that_cannot_be_meant_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(BertlingError, match="input: no text file is given"):
        build_corpus([], tokenizer, tmp_path)
    with pytest.raises(BertlingError, match="no such file"):
        build_corpus([tmp_path / "none.txt"], tokenizer, tmp_path)
    with pytest.raises(BertlingError, match="this is a folder"):
        build_corpus([tmp_path], tokenizer, tmp_path)
    for how in ({"method": "segment"}, {"seq_len": 128}):
        with pytest.raises(ValueError, match="seq_len belongs to method 'segment'"):
            build_corpus([TINY], tokenizer, tmp_path, **how)
    with pytest.raises(BertlingError, match="seq_len: must be at least 3, not 2"):
        build_corpus([TINY], tokenizer, tmp_path, method="segment", seq_len=2)


def test_a_dead_worker_is_one_clear_line(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_start_worker", sys.exit)
    with pytest.raises(BertlingError, match="a worker process died or ran out of memory; give fewer workers") as caught:
        build_corpus([TINY], tokenizer, tmp_path / "cache", workers=2)
    assert isinstance(caught.value.__cause__, BrokenProcessPool)
    assert list((tmp_path / "cache").glob("*")) == []


def test_the_corpus_that_another_process_finished_first_is_used(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = corpus_module._Builder.build

    def overtaken(self: Any, drop_duplicates: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(corpus_module._Builder, "build", real)
            build_corpus([TINY], tokenizer, tmp_path)
        raise BertlingError("the rename failed")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module._Builder, "build", overtaken)
        assert build_corpus([TINY], tokenizer, tmp_path).stats["documents"] == 8


SCRIPT = """
import sys
from pathlib import Path
from bertling.corpus import build_corpus
from bertling.tokenizer import Tokenizer

if __name__ == "__main__":
    source, vocabulary, cache = map(Path, sys.argv[1:4])
    print("begun", flush=True)
    print(build_corpus([source], Tokenizer.load(vocabulary), cache, workers=2).folder.name, flush=True)
"""


def start(tmp_path: Path, source: Path) -> "subprocess.Popen[str]":
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(ASSETS / "vocab"), str(tmp_path / "cache")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_two_processes_at_once_give_one_corpus(tmp_path: Path, tokenizer: Tokenizer) -> None:
    running = [start(tmp_path, TINY) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in running]
    names = {output.split()[-1] for output, _ in outputs}
    assert [process.returncode for process in running] == [0, 0], outputs
    assert names == {path.name for path in (tmp_path / "cache").glob("*")}
    assert len(names) == 1
    assert build_corpus([TINY], tokenizer, tmp_path / "cache").stats["documents"] == 8


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    source = tmp_path / "pipe.txt"
    source.write_text("".join(f"the kite {number} of the sea\n" for number in range(2_000_000)))
    process = start(tmp_path, source)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    deadline = time.monotonic() + 30
    while len(session(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(session(process.pid)) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session(process.pid) == []


def session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_corpus_that_vanishes_as_it_is_finished_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_open", lambda folder: None)
    with pytest.raises(BertlingError, match="changed while it was written; run the same command again"):
        build_corpus([TINY], tokenizer, tmp_path, workers=1)
