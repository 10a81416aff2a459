"""Text files as a stream of documents: compressed or not, bounded in memory, tidied."""

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from bertling.files import BertlingError, one_line, readable_errors

Progress = Callable[[int, int], None]
"""Called with bytes of input read so far, and in all."""

MAX_PIECE = 1 << 20
"""Characters of text that are handled at once."""
JSON_LINES = (".jsonl", ".ndjson")
_MAX_RECORD = 1 << 26
_BLOCK = 1 << 20
_BOMB_BYTES, _BOMB_RATIO = 1 << 28, 200
_TITLE = re.compile(r"^ = [^=\n](?:[^\n]*[^=\n])? = ?$", re.MULTILINE)
_ESCAPED = re.compile(r" ?@([-,.])@ ?")
_UNCLEAN = re.compile(r"[^A-Za-z0-9\s,.!?'\"-]+")
_MARKERS = re.compile(r"\[(PAD|CLS|SEP|MASK)\]")
_SPACES = re.compile(r"[^\S\n]+")


@dataclass(frozen=True)
class TextOptions:
    """How text files are read."""

    wikitext: bool | None = None
    """Undo WikiText's `@-@ @,@ @.@ <unk>`, and start documents at ` = Title = ` lines; unset: in files that begin with
    one."""
    clean: bool = False
    """Keep only ASCII letters, digits, white space and , . ! ? ' " - and squeeze white space."""
    text_field: str = "text"
    """The field of JSON lines, or the column of a parquet file, that holds the text."""


@dataclass(frozen=True)
class Piece:
    """A stretch of one document, cut at a line's end where it can be; `last` says that the document ends with it."""

    document: int
    text: str
    last: bool
    wikitext: bool = False
    """The text is still WikiText's."""


def kind_of(path: Path) -> tuple[str, str]:
    """Content (text, jsonl, parquet) and compression (gz, xz, zst or none) by the file's name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop()[1:] if suffixes and suffixes[-1] in (".gz", ".xz", ".zst") else ""
    if suffixes and suffixes[-1] == ".parquet":
        if compression:
            raise BertlingError(f"{path}: a compressed parquet file is not supported; unpack it first")
        return "parquet", ""
    return "jsonl" if suffixes and suffixes[-1] in JSON_LINES else "text", compression


def read_pieces(
    paths: Sequence[Path], options: TextOptions = TextOptions(), progress: Progress | None = None
) -> Iterator[Piece]:
    """Pieces of all documents in the order of the files, as they stand there (see `tidy`).

    A document starts at a ` = Title = ` line in files that begin with one (in plain ones too wherever `wikitext` is
    asked for, in others where the file before was such a one); else it is a file, a JSON line, a parquet row. Blank
    ones are left out. A file that is missing, empty, truncated, not UTF-8 or lacks the field is refused.
    """
    total = sum(size_of(path) for path in paths)
    done = document = 0
    titles = False
    for path in paths:

        def report(position: int, done: int = done) -> None:
            if progress:
                progress(done + position, total)

        with readable_errors(path):
            before = document
            for text, last, wikitext in _file_pieces(path, options, report, titles):
                yield Piece(document, text, last, wikitext)
                document += last
                titles = wikitext
            if document == before:
                raise BertlingError(f"{path}: empty: there is no text in it; name a file with text")
            done += path.stat().st_size
            report(0, done)


def size_of(path: Path) -> int:
    """Bytes of a file of text; what is not there, or can be read only once, is refused."""
    with readable_errors(path):
        size = path.stat().st_size
        if path.is_dir():
            raise BertlingError(f"{path}: this is a folder: name the files in it")
        if not path.is_file():
            raise BertlingError(f"{path}: can be read only once, as a pipe; write the text to a file first")
        return size


def iter_documents(
    paths: Sequence[Path], options: TextOptions = TextOptions(), progress: Progress | None = None
) -> Iterator[Piece]:
    """`read_pieces` with the text tidied."""
    for piece in read_pieces(paths, options, progress):
        yield Piece(piece.document, tidy(piece.text, wikitext=piece.wikitext, clean=options.clean), piece.last)


class Lines:
    """The lines of text files that are not blank, readable any number of times."""

    def __init__(
        self,
        paths: Sequence[Path],
        options: TextOptions = TextOptions(),
        progress: Progress | None = None,
        *,
        reads: int = 1,
    ) -> None:
        """`progress` counts through all of the `reads` readings that are to come."""
        self._paths, self._options, self._progress, self._reads = tuple(paths), options, progress, reads
        self._begun = 0

    def __iter__(self) -> Iterator[str]:
        nth, self._begun = self._begun, self._begun + 1

        def report(done: int, total: int) -> None:
            if self._progress:
                self._progress(nth * total + done, max(self._reads, nth + 1) * total)

        for piece in iter_documents(self._paths, self._options, report):
            yield from (line for line in piece.text.split("\n") if line and not line.isspace())


def tidy(text: str, *, wikitext: bool, clean: bool) -> str:
    """Undo WikiText's escapes (`0 @.@ 7` is 0.7, `<unk>` is [UNK]) and clean, as asked; lines stay lines.

    A text that speaks of [CLS], [SEP], [PAD] or [MASK] means these words, not the tokens: `[ CLS ]` says the same.
    """
    text = _MARKERS.sub(r"[ \1 ]", text)
    if wikitext:
        text = _ESCAPED.sub(r"\1", text).replace("<unk>", "[UNK]")
    if clean:
        kept = text.split("[UNK]") if wikitext else [text]
        text = "[UNK]".join(_UNCLEAN.sub("", part) for part in kept)
        text = "\n".join(line.strip() for line in _SPACES.sub(" ", text).split("\n"))
    return text


def _file_pieces(
    path: Path, options: TextOptions, report: Callable[[int], None], titles: bool
) -> Iterator[tuple[str, bool, bool]]:
    """(text, last of its document, is WikiText) of one file; `titles`: the one before was WikiText.

    Data sets come in parts whose rows are lines, and all but the first part begin in the middle of an article.
    """
    plain = kind_of(path)[0] == "text"
    records = _records(path, options, report)
    head: list[tuple[bool, str]] = []
    for record in records:
        head.append(record)
        if record[1] and not record[1].isspace():
            break
    else:
        return
    title = _TITLE.search(head[-1][1])
    titled = (title is not None and not head[-1][1][: title.start()].strip()) or (titles and not plain)
    wikitext = titled if options.wikitext is None else options.wikitext
    titled = wikitext and (titled or plain)

    def stretches() -> Iterator[tuple[bool, str]]:
        yield from head
        yield from records

    parts = _at_titles(stretches()) if titled else stretches()
    for text, last in _pieces(parts):
        yield text, last, wikitext


def _at_titles(stretches: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
    """(starts a document, text): documents start at title lines, wherever the records of the file end."""
    at_line_start = True
    for new_record, text in stretches:
        if new_record and not at_line_start:
            text, at_line_start = "\n" + text, True
        begin = 0
        starts = False
        for match in _TITLE.finditer(text):
            if match.start() == 0 and not at_line_start:
                continue
            if match.start() > begin:
                yield starts, text[begin : match.start()]
            begin, starts = match.start(), True
        if text:
            yield starts, text[begin:]
            at_line_start = text.endswith("\n")


def _pieces(stretches: Iterable[tuple[bool, str]]) -> Iterator[tuple[str, bool]]:
    """(text, last) of documents that are not blank; where a document is cut depends on nothing but its own text."""
    held, begun = "", False
    for starts, text in stretches:
        if starts:
            if begun or held.strip():
                yield held, True
            held, begun = "", False
        held += text
        done = 0
        while len(held) - done > MAX_PIECE:
            end = done + MAX_PIECE
            cut = held.rfind("\n", done, end) + 1 or held.rfind(" ", done, end) + 1 or end
            begun = begun or bool(held[done:cut].strip())
            if begun:
                yield held[done:cut], False
            done = cut
        held = held[done:]
    if begun or held.strip():
        yield held, True


def _records(path: Path, options: TextOptions, report: Callable[[int], None]) -> Iterator[tuple[bool, str]]:
    """(starts a record, text); a long record comes in several stretches."""
    content, compression = kind_of(path)
    if content == "parquet":
        return _parquet_records(path, options.text_field, report)
    blocks = _decoded(path, _unpacked(path, compression, report))
    if content == "jsonl":
        return _json_records(path, options.text_field, blocks)
    return ((number == 0, text) for number, text in enumerate(_whole_lines(path, blocks, MAX_PIECE, cut=True)))


def _unpacked(path: Path, compression: str, report: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as raw:
        stream: Any = raw
        try:
            if compression == "gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif compression == "xz":
                stream = lzma.open(raw)
            elif compression == "zst":
                stream = _ZstdFile(raw)
            unpacked = 0
            while block := stream.read(_BLOCK):
                unpacked += len(block)
                if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * raw.tell():
                    raise BertlingError(
                        f"{path}: unpacks to more than {_BOMB_RATIO} times its size: no text does; unpack it yourself "
                        "and look at it"
                    )
                report(raw.tell())
                yield block
        except EOFError as error:
            raise BertlingError(f"{path}: this {compression} file ends too early; fetch or make it again") from error
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise BertlingError(
                f"{path}: damaged, or not {compression} data ({one_line(error)}); make it again"
            ) from error


class _ZstdFile:
    """Reads zstd frames with pyarrow, which notices a truncated file, with the exceptions of the other formats."""

    def __init__(self, raw: BinaryIO) -> None:
        self._stream = pyarrow.CompressedInputStream(raw, "zstd")

    def read(self, size: int) -> bytes:
        try:
            block: bytes = self._stream.read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            if "runcated" in str(error):
                raise EOFError from error
            raise zlib.error(str(error)) from error
        return block


def _decoded(path: Path, blocks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 text with line feeds only; what is not text is refused with its line."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    try:
        for block in blocks:
            yield (text := _checked(path, decoder.decode(block), line))
            line += text.count("\n")
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        wrong = error.object[error.start]
        raise BertlingError(
            f"{path}: line {line}: not UTF-8 text (byte 0x{wrong:02x}); convert the file to UTF-8, or name a text file"
        ) from error


def _checked(path: Path, text: str, line: int) -> str:
    if "\0" in text:
        line += text[: text.index("\0")].count("\n")
        raise BertlingError(f"{path}: line {line}: holds a NUL byte: binary data, not text; name a text file")
    return text


def _whole_lines(path: Path, blocks: Iterable[str], longest: int, *, cut: bool) -> Iterator[str]:
    """Blocks that end where a line ends; a line over `longest` characters is cut, or refused."""
    held, lines = "", 0
    for block in blocks:
        held += block
        end = held.rfind("\n") + 1
        if not end and len(held) > longest:
            if not cut:
                raise BertlingError(f"{path}: line {lines + 1}: longer than {longest:,} characters; split this record")
            end = len(held)
        if end:
            lines += 0 if cut else held.count("\n")
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _json_records(path: Path, field: str, blocks: Iterable[str]) -> Iterator[tuple[bool, str]]:
    number = 0
    for chunk in _whole_lines(path, blocks, _MAX_RECORD, cut=False):
        for line in chunk.removesuffix("\n").split("\n"):
            number += 1
            if not line or line.isspace():
                continue
            where = f"{path}: line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BertlingError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
            if not isinstance(record, dict):
                raise BertlingError(f"{where}: a JSON {type(record).__name__}; each line must be one JSON object")
            if field not in record:
                raise BertlingError(f"{where}: no field '{field}' (it has {_names(record)}); name the text's field")
            text = "" if record[field] is None else record[field]
            if not isinstance(text, str):
                kind = type(text).__name__
                raise BertlingError(f"{where}: field '{field}' holds a {kind}, not text; name the text's field")
            # A lone surrogate (\ud800) is valid JSON but no character.
            yield True, text.encode("utf-8", "replace").decode().replace("\r\n", "\n")


def _parquet_records(path: Path, column: str, report: Callable[[int], None]) -> Iterator[tuple[bool, str]]:
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as file:
            schema, rows, size = file.schema_arrow, max(file.metadata.num_rows, 1), path.stat().st_size
            if column not in schema.names:
                raise BertlingError(
                    f"{path}: no column '{column}' (it has {_names(schema.names)}); name the text's column"
                )
            if (same := schema.names.count(column)) > 1:
                raise BertlingError(f"{path}: has {same} columns named '{column}'; rename one")
            kind = schema.field(column).type
            if pyarrow.types.is_dictionary(kind):  # a category of pandas
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise BertlingError(f"{path}: column '{column}' holds {kind}, not text; name the text's column")
            done = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield True, (text or "").replace("\r\n", "\n")
                done += len(batch)
                report(size * done // rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise BertlingError(f"{path}: damaged, or not a parquet file ({one_line(error)}); make it again") from error


def _names(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "none"
