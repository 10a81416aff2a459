"""Reading text files: forms, documents, bounded pieces, tidying, and every refusal."""

import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bertling.duplicates import DuplicateFinder
from bertling.files import BertlingError
from bertling.text import MAX_PIECE, Lines, TextOptions, iter_documents, read_pieces, tidy

TINY = Path(__file__).parent / "assets" / "tiny.txt"
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-103" / "wiki.valid.tokens"
CATEGORY = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
RECORDS = ["first text\nwith two lines", "second text", "  ", "third"]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACKERS: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def documents(*paths: Path, options: TextOptions | None = None) -> list[str]:
    found: dict[int, str] = {}
    for piece in iter_documents(paths, options or TextOptions()):
        assert len(piece.text) <= MAX_PIECE
        found[piece.document] = found.get(piece.document, "") + piece.text
    assert sorted(found) == list(range(len(found)))
    return list(found.values())


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def json_lines(records: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: record, "n": 1}) + "\n" for record in records).encode()


@pytest.mark.parametrize("packing", PACKERS)
def test_titled_text_gives_one_document_per_title_in_each_packing(tmp_path: Path, packing: str) -> None:
    path = write(tmp_path / f"a.txt{packing}", PACKERS[packing](TINY.read_bytes()))
    found = documents(path)
    assert len(found) == 8
    assert all(text.startswith(" = ") for text in found)
    assert "".join(found) == TINY.read_text()
    assert " = = Old bread = = " in found[1]


@pytest.mark.parametrize("packing", PACKERS)
def test_json_lines_are_documents_in_each_packing(tmp_path: Path, packing: str) -> None:
    path = write(tmp_path / f"a.jsonl{packing}", PACKERS[packing](json_lines(RECORDS)))
    assert documents(path) == [RECORDS[0], RECORDS[1], RECORDS[3]]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), CATEGORY])
def test_parquet_rows_are_documents(tmp_path: Path, kind: Any) -> None:
    table = pyarrow.table({"body": pyarrow.array([*RECORDS, None], kind), "n": [1, 2, 3, 4, 5]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", options=TextOptions(text_field="body")) == [*RECORDS[:2], RECORDS[3]]


def test_rows_that_are_lines_of_titled_text_are_put_together(tmp_path: Path) -> None:
    rows = ["", " = One = \n", " body @-@ text \n", " = = Section = = ", " more", " = Two = \n", " end \n"]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == [
        " = One = \n body-text \n = = Section = = \n more\n",
        " = Two = \n end \n",
    ]


def test_a_further_part_of_such_rows_goes_on_in_the_same_way(tmp_path: Path) -> None:
    parts = [["", " = One = \n", " body \n"], [" more @-@ \n", " = Two = \n", " end \n"]]
    for number, rows in enumerate(parts):
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"{number}.parquet")
    found = documents(tmp_path / "0.parquet", tmp_path / "1.parquet")
    assert found == [" = One = \n body \n", " more-\n", " = Two = \n end \n"]


def test_other_files_are_one_document_each_and_numbered_on(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.txt", "a b\r\nc\rd"), write(tmp_path / "two.tokens", "\ufeffe f")
    assert documents(one, two) == ["a b\nc\nd", "e f"]
    assert [piece.document for piece in read_pieces([one, TINY, two])] == list(range(10))


def test_gzip_members_and_zstd_frames_follow_one_another(tmp_path: Path) -> None:
    for packing in (".gz", ".zst", ".xz"):
        path = write(tmp_path / f"a{packing}", PACKERS[packing](b"one ") + PACKERS[packing](b"two"))
        assert documents(path) == ["one two"]


def test_wikitext_is_undone_where_it_is_found_or_asked_for(tmp_path: Path) -> None:
    text = " = Title = \n 0 @.@ 7 kg , 4 @,@ 000 well @-@ known <unk> , a@b"
    undone = " = Title = \n 0.7 kg , 4,000 well-known [UNK] , a@b"
    titled, plain = write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", "x" + text)
    assert documents(titled) == [undone]
    assert documents(plain) == ["x" + text]
    assert documents(plain, options=TextOptions(wikitext=True)) == ["x" + undone]
    two = write(tmp_path / "c.txt", text + "\n = Next = \n")
    assert len(documents(two)) == 2
    assert documents(two, options=TextOptions(wikitext=False)) == [text + "\n = Next = \n"]


def test_titles_begin_documents_where_wikitext_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "part.txt", "the end of one @-@ half\n = B = \n text \n = C = \n text \n")
    assert len(documents(path)) == 1
    found = documents(path, options=TextOptions(wikitext=True))
    assert [text.split("\n")[0] for text in found] == ["the end of one-half", " = B = ", " = C = "]
    lines = write(tmp_path / "a.jsonl", json_lines(["one", "two"]))
    assert documents(lines, options=TextOptions(wikitext=True)) == ["one", "two"]


def test_a_json_null_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert documents(path) == ["one", "two"]


def test_sections_and_equations_start_no_document(tmp_path: Path) -> None:
    lines = ["", " = A = ", " = = B = = ", "= C =", " = D", " = = = E = = = ", "x = y", " = E = mc2 = ", "end"]
    found = documents(write(tmp_path / "a.txt", "\n".join(lines)))
    assert [text.strip().split("\n")[0].strip() for text in found] == ["= A =", "= E = mc2 ="]


def test_the_official_file_has_its_sixty_articles() -> None:
    if not WIKITEXT.exists():
        pytest.skip("WikiText-103 is not on this machine")
    found = documents(WIKITEXT)
    assert len(found) == 60
    assert not any(mark in text for text in found for mark in ("@-@", "@,@", "@.@", "<unk>"))
    assert sum(text.count("[UNK]") for text in found) == WIKITEXT.read_text().count("<unk>")


def test_cleaner_keeps_the_lines_and_what_it_names() -> None:
    dirty = 'Caf\xe9\t(new)!  \n\n "it\'s" 5%, a-b? \xa0 <unk>'
    assert tidy(dirty, wikitext=False, clean=True) == 'Caf new!\n\n"it\'s" 5, a-b? unk'
    assert tidy(dirty, wikitext=True, clean=True) == 'Caf new!\n\n"it\'s" 5, a-b? [UNK]'
    assert tidy(dirty, wikitext=False, clean=False) == dirty


def test_long_documents_are_cut_at_lines_words_or_anywhere_and_only_by_their_own_text(tmp_path: Path) -> None:
    body = "word word\n" * (MAX_PIECE // 7)
    texts = {"lines": body, "words": body.replace("\n", " "), "none": body.replace("\n", "").replace(" ", "")}
    for name, text in texts.items():
        alone = write(tmp_path / f"{name}.txt", text)
        after = write(tmp_path / f"{name}.jsonl", json_lines(["x" * 1234, text]))
        pieces = list(read_pieces([alone]))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len(pieces) > 1
        assert [piece.text for piece in pieces] == [piece.text for piece in read_pieces([after])][1:]
    assert next(iter(read_pieces([tmp_path / "lines.txt"]))).text.endswith("\n")
    assert next(iter(read_pieces([tmp_path / "words.txt"]))).text.endswith(" ")


def test_one_endless_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"endless words " * 3_600_000, compresslevel=1))
    tracemalloc.start()
    total = sum(len(piece.text) for piece in iter_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 14 * 3_600_000
    assert peak < 16 * MAX_PIECE


def test_a_title_split_by_a_block_is_found_and_a_long_line_starts_nothing(tmp_path: Path) -> None:
    filler = "x" * (MAX_PIECE - 20)
    text = f" = One = \n{filler}\n = Two = \n{'y ' * MAX_PIECE} = No = \n = Three = \nz"
    found = documents(write(tmp_path / "a.txt", text))
    assert [part[:12].split("\n")[0] for part in found] == [" = One = ", " = Two = ", " = Three = "]
    assert "".join(found) == text


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 999}), tmp_path / "a.parquet")
    packed = write(tmp_path / "a.txt.xz", lzma.compress(TINY.read_bytes()))
    paths = [TINY, packed, tmp_path / "a.parquet"]
    lines = Lines(paths, progress=lambda done, total: calls.append((done, total)), reads=2)
    first, second = list(lines), list(lines)
    assert first == second
    assert "".join(first)
    assert calls == sorted(calls)
    size = sum(path.stat().st_size for path in paths)
    assert calls[-1] == (2 * size, 2 * size)


def test_lines_leaves_blank_ones_out(tmp_path: Path) -> None:
    assert list(Lines([write(tmp_path / "a.txt", "one\n\n \ntwo\n")])) == ["one", "two"]


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.txt", b"", "empty: there is no text in it"),
    ("a.txt", b" \n \n", "empty: there is no text in it"),
    ("a.jsonl", b"\n", "empty: there is no text in it"),
    ("a.txt.gz", gzip.compress(b""), "empty: there is no text in it"),
    ("a.txt", b"one\ntwo \xe9t\xe9\n", r"line 2: not UTF-8 text \(byte 0xe9\); convert the file to UTF-8"),
    ("a.txt", b"x\n" * 1_500_000 + b"\xff", "line 1500001: not UTF-8 text"),
    ("a.txt", b"one\n\xe2\x82", "line 2: not UTF-8 text"),
    ("a.txt", "text".encode("utf-16"), r"line 1: not UTF-8 text \(byte 0xff\)"),
    ("a.txt", b"one\ntwo\n\x7fELF\0\0", "line 3: holds a NUL byte: binary data"),
    ("a.txt.gz", gzip.compress(TINY.read_bytes())[:-9], "this gz file ends too early"),
    ("a.txt.xz", lzma.compress(TINY.read_bytes())[:-9], "this xz file ends too early"),
    ("a.txt.zst", zstd(TINY.read_bytes())[:-9], "this zst file ends too early"),
    ("a.txt.gz", b"plain text", "damaged, or not gz data"),
    ("a.txt.xz", b"plain text", "damaged, or not xz data"),
    ("a.txt.zst", b"plain text", "damaged, or not zst data"),
    ("a.txt.gz", gzip.compress(b"one") + b"rest", "damaged, or not gz data"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3: a JSON list; each line must be one JSON object"),
    ("a.jsonl", b'{"body": "a", "id": 3}\n', r"line 1: no field 'text' \(it has body, id\)"),
    ("a.jsonl", b'{"text": 5}\n', "line 1: field 'text' holds a int, not text"),
    ("a.parquet", b"PAR1 but not really", "damaged, or not a parquet file"),
    ("a.parquet.gz", b"", "a compressed parquet file is not supported"),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED, ids=[f"{row[0]}-{row[2][:30]}" for row in REFUSED])
def test_unusable_file_is_refused_in_one_line_with_its_name(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(BertlingError, match=message) as caught:
        documents(TINY, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


def test_missing_file_or_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match="no such file"):
        next(read_pieces([TINY, tmp_path / "none.txt"]))
    with pytest.raises(BertlingError, match="this is a folder: name the files in it"):
        next(read_pieces([TINY, tmp_path]))


def test_parquet_without_a_text_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"sentence": ["a"], "label": [1]}), path)
    with pytest.raises(BertlingError, match=r"no column 'text' \(it has sentence, label\)"):
        documents(path)
    with pytest.raises(BertlingError, match="column 'label' holds int64, not text"):
        documents(path, options=TextOptions(text_field="label"))
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(BertlingError, match=r"a\.parquet: has 2 columns named 'text'; rename one$"):
        documents(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BertlingError, match="damaged, or not a parquet file"):
        documents(path)


def test_a_json_line_beyond_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertling.text._MAX_RECORD", 1000)
    with pytest.raises(BertlingError, match="line 2: longer than 1,000 characters; split this record"):
        documents(write(tmp_path / "a.jsonl", json_lines(["a", "b" * (3 * MAX_PIECE)])))


def test_json_escapes_that_are_no_characters_become_marks(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.jsonl", b'{"text": "a \\ud800 b"}')) == ["a ? b"]


@pytest.mark.parametrize("cap", [256, 1 << 20])
def test_duplicates_are_found_with_and_without_the_disk(tmp_path: Path, cap: int) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 300, 1000, dtype=np.uint64) << np.uint64(55)
    seen: set[int] = set()
    expected = []
    for value in hashes.tolist():
        expected.append(value in seen and value != 0)
        seen.add(value)
    with DuplicateFinder(tmp_path / "spill", max_bytes=cap) as finder:
        for part in np.array_split(hashes, 37):
            finder.add(part)
        assert (tmp_path / "spill").exists() == (cap == 256)
        finder.finish()
        assert finder.repeats == sum(expected)
        assert finder.is_repeat(0, 1000).tolist() == expected
        assert finder.is_repeat(3, 11).tolist() == expected[3:11]
    assert not (tmp_path / "spill").exists()


def test_no_hashes_no_duplicates(tmp_path: Path) -> None:
    with DuplicateFinder(tmp_path / "spill") as finder:
        finder.finish()
        assert finder.repeats == 0
