"""Writing and reading files so that nothing half-written is ever left, and every failure is one clear line."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class BertlingError(Exception):
    """What went wrong, where, and what to do, in one line for the user; the command exits with status 2."""


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            "ENOSPC": "the disk is full: free some space, then run the same command again",
            "EDQUOT": "the disk quota is used up: free some space, then run the same command again",
            "EACCES": "permission denied: choose another folder or change its permissions",
            "EROFS": "the file system is read-only: choose another folder",
            "ENOENT": "no such file or folder: check the path",
            "EISDIR": "this is a folder: name a file",
            "ENOTDIR": "a part of this path is a file, not a folder: choose another path",
        }
        name = "" if error.errno is None else errno.errorcode.get(error.errno, "")
        raise BertlingError(f"{path}: {hints.get(name, error.strerror or str(error))}") from error


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it, then rename it to `path`."""
    raw = data.encode() if isinstance(data, str) else data
    with atomic_file(path) as temporary:
        temporary.write_bytes(raw)


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders that `path` is to lie in; on failure those that were made are taken away again."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed, on failure it is removed."""
    with readable_errors(path), parents_of(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            fsync_path(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success all of it is flushed and renamed to `target`.

    An existing target is an error unless `force`, which swaps it out only once the new one is complete.
    """
    if target.exists() and not force:
        raise BertlingError(f"{target}: exists already; give --force to replace it, or choose another name")
    with readable_errors(target), parents_of(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                fsync_path(path)
            os.chmod(temporary, 0o755)
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
                os.replace(target, old / target.name)
                os.replace(temporary, target)
                shutil.rmtree(old)
            else:
                os.replace(temporary, target)
            fsync_path(target.parent)
        except BertlingError as error:
            if str(temporary) not in str(error):
                raise
            raise BertlingError(str(error).replace(str(temporary), str(target))) from error.__cause__
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with readable_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Load a JSON object; `what` names the file's role in the error."""
    with readable_errors(path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise BertlingError(f"{path}: this {what} is not valid JSON ({error}); restore or remake it") from error
    if not isinstance(value, dict):
        raise BertlingError(f"{path}: this {what} must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, readable and with a stable order of keys."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
