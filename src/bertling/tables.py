"""Two columns, text and label, out of a .parquet, .tsv, .csv or .jsonl file as they stand there."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from bertling.files import BertlingError, readable_errors
from bertling.text import JSON_LINES

TEXT_COLUMNS = ("sentence", "text", "review", "content", "question")
LABEL_COLUMNS = ("label", "labels", "class", "target", "sentiment")
TABLES = (".parquet", ".tsv", ".csv", *JSON_LINES)
"""Endings of files of labelled texts."""
MOST_BYTES = 1 << 30
"""Labelled texts are held in memory, so there is a limit."""


@dataclass(frozen=True)
class Columns:
    """The two columns of a file as they are, and for each row the number that an error can name."""

    texts: list[Any]
    labels: list[Any]
    numbers: Sequence[int]
    unit: str


def read_columns(path: Path, text_column: str | int | None, label_column: str | int | None) -> Columns:
    """The two columns: as named, or by their usual names, or by 0-based numbers in a table without a header."""
    text = None if text_column is None else str(text_column)
    label = None if label_column is None else str(label_column)
    if text is not None and text == label:
        raise BertlingError(f"{path}: column {text!r} is named for texts and for labels; name two")
    ending = table_ending(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, text, label)
    if ending in JSON_LINES:
        return _read_jsonl(path, text, label)
    if ending in (".tsv", ".csv"):
        return _read_table(path, text, label, tabs=ending == ".tsv")
    raise BertlingError(f"{path}: labelled texts come as .parquet, .tsv, .csv or .jsonl; rename or convert it")


def table_ending(path: Path) -> str:
    """The ending of a file's name that says what it holds, in lower case, a .gz after it left out."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def decode_utf8(name: Path | str, raw: bytes, first_line: int = 1) -> str:
    """Decode text that must be UTF-8; an error names the file and the line, counted from `first_line`."""
    end = raw.find(b"\0")
    try:
        if end < 0:
            return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
        problem = "a zero byte: this is a binary file or UTF-16"
    except UnicodeDecodeError as error:
        end = error.start
        problem = f"byte 0x{error.object[end]:02x} is not UTF-8"
    line = first_line + raw.count(b"\n", 0, end)
    raise BertlingError(f"{name}: line {line}: {problem}; convert the file to UTF-8 text")


def check_text(where: str, text: str) -> None:
    """Refuse half characters (lone surrogates), which come from broken \\u escapes or names and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BertlingError(f"{where}: character {error.start + 1} of the text is no Unicode; mend it") from error


def shorten(value: object) -> str:
    """The value as an error shows it: 40 characters of it on one line."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _choose(path: Path, there: Sequence[str], given: str | None, usual: Sequence[str], role: str) -> str:
    """The column of this role: the one that was named, else the first usual name that is there; twice is refused."""
    by_name = {name.strip().lower(): name for name in reversed(there)}
    found = given if given in there else None
    if given is None:
        found = next((by_name[name] for name in usual if name in by_name), None)
    if found is not None:
        if there.count(found) > 1:
            raise BertlingError(f"{path}: has {there.count(found)} columns named {shorten(found)}; rename one")
        return found
    problem = f"no {role} column was recognised" if given is None else f"there is no column {given!r}"
    shown = ", ".join(shorten(name) for name in there[:20])
    raise BertlingError(
        f"{path}: {problem}; its columns are {shown}: name one with {role}-column "
        "(0-based numbers for both columns of a .tsv or .csv file without a header)"
    )


def _read_parquet(path: Path, text: str | None, label: str | None) -> Columns:
    try:
        with readable_errors(path):
            if path.stat().st_size == 0:
                raise BertlingError(f"{path}: is empty; give a file with at least one row")
            texts: list[Any] = []
            labels: list[Any] = []
            size = 0
            with pyarrow.parquet.ParquetFile(path) as file:
                there = file.schema_arrow.names
                text = _choose(path, there, text, TEXT_COLUMNS, "text")
                label = _choose(path, there, label, LABEL_COLUMNS, "label")
                # A small file may hold a long text, repeated without end, so look before all of it is unpacked.
                for batch in file.iter_batches(batch_size=256, columns=list({text, label})):
                    size += batch.nbytes
                    _check_size(path, size)
                    texts += batch.column(text).to_pylist()
                    labels += batch.column(label).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # names of columns, too, are decoded only then
        reason = str(error).splitlines()[0]
        raise BertlingError(f"{path}: is not a readable parquet file ({reason}); fetch or make it again") from error
    return Columns(texts, labels, range(1, len(texts) + 1), "row")


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, through gzip if it ends in .gz; what cannot be read is one clear line."""
    with readable_errors(path):
        try:
            opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
            with opener(path, "rb") as file:
                yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BertlingError(f"{path}: is not a complete gzip file; fetch or make it again") from error


def _check_size(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise BertlingError(f"{path}: holds more than {MOST_BYTES >> 20} MiB of labelled texts; give a part of them")


def _read_text(path: Path) -> str:
    with open_bytes(path) as file:
        raw = file.read(MOST_BYTES + 1)
    _check_size(path, len(raw))
    content = decode_utf8(path, raw)
    if not content.strip():
        raise BertlingError(f"{path}: is empty; give a file with at least one row")
    return content


def _read_jsonl(path: Path, text: str | None, label: str | None) -> Columns:
    numbers: list[int] = []
    columns = Columns([], [], numbers, "line")
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BertlingError(f"{path}: line {number}: is not valid JSON; write one object per line") from error
        if not isinstance(record, dict):
            raise BertlingError(f"{path}: line {number}: must hold a JSON object, not {shorten(record)}; mend it")
        if not numbers:
            text = _choose(path, list(record), text, TEXT_COLUMNS, "text")
            label = _choose(path, list(record), label, LABEL_COLUMNS, "label")
        for field, values in ((text, columns.texts), (label, columns.labels)):
            if field not in record:
                raise BertlingError(f"{path}: line {number}: the field {field!r} is missing; add it to every line")
            values.append(record[field])
        numbers.append(number)
    return columns


def _table_rows(path: Path, content: str, *, tabs: bool) -> list[tuple[int, list[str]]]:
    """Non-empty rows with the number of the line where each one ends."""
    if tabs:
        lines = enumerate(content.split("\n"), start=1)
        return [(number, line.rstrip("\r").split("\t")) for number, line in lines if line.strip()]
    csv.field_size_limit(MOST_BYTES)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise BertlingError(f"{path}: line {reader.line_num}: is not valid CSV ({error}); mend the quotes") from error


def _read_table(path: Path, text: str | None, label: str | None, *, tabs: bool) -> Columns:
    rows = _table_rows(path, _read_text(path), tabs=tabs)
    numbered = [name is not None and name.isdecimal() for name in (text, label)]
    if any(numbered) and not all(numbered):
        raise BertlingError(
            f"{path}: text-column {text} and label-column {label}: give both as names, or both as 0-based numbers "
            "(for a file without a header)"
        )
    header = [str(i) for i in range(len(rows[0][1]))] if all(numbered) else rows.pop(0)[1]
    text = _choose(path, header, text, TEXT_COLUMNS, "text")
    label = _choose(path, header, label, LABEL_COLUMNS, "label")
    for number, row in rows:
        if len(row) != len(header):
            hint = "a text must not hold a tab" if tabs else "quote a text that holds a comma"
            raise BertlingError(f"{path}: line {number}: {len(row)} fields instead of {len(header)}; {hint}")
    text_at, label_at = header.index(text), header.index(label)
    texts, labels = [row[text_at] for _, row in rows], [row[label_at] for _, row in rows]
    return Columns(texts, labels, [number for number, _ in rows], "line")
