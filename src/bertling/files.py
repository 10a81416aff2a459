"""Writing and reading files so that nothing half-written is ever left, and every failure is one clear line."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError as error:
    raise ImportError("bertling runs on Linux and macOS; on Windows, in its Linux subsystem (WSL)") from error

UNFINISHED, REPLACED = ".bertling-tmp", ".bertling-old"
"""Endings of hidden names: what is being written, and what is just being replaced."""
MOST_JSON = 1 << 26


class BertlingError(Exception):
    """What went wrong, where, and what to do, in one line for the user; the command exits with status 2."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk or a used-up quota is behind an error."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


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
            "EEXIST": "a file of this name is in the way: choose another path",
            "EISDIR": "this is a folder: name a file",
            "ENOTDIR": "a part of this path is a file, not a folder: choose another path",
        }
        name = "" if error.errno is None else errno.errorcode.get(error.errno, "")
        said = " ".join((error.strerror or str(error)).split())
        other = said if name else f"cannot be read ({said:.200}); fetch or make it again"
        raise BertlingError(f"{path}: {hints.get(name, other)}") from error


def refuse_file(path: Path, what: str) -> None:
    """Refuse a path that is a file where a folder for `what` is to come."""
    if path.exists() and not path.is_dir():
        raise BertlingError(f"{path}: is a file; give a folder for {what}")


def one_line(error: Exception) -> str:
    """What a library says of an error, on one line and not too long for part of another one."""
    return " ".join(str(error).split())[:200]


def is_of_disk(error: BertlingError) -> bool:
    """Whether the system's refusal to read or write is behind an error."""
    return isinstance(error.__cause__, OSError)


@contextmanager
def skipped_where_disk_fails() -> Iterator[None]:
    """Let something that can be done without be left out where the disk is full, or fails."""
    try:
        yield
    except BertlingError as error:
        if not is_of_disk(error):
            raise


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
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a file or folder against the processes that ask for it in this way; the system frees it at our death.

    Where another one has it, wait, or else raise BlockingIOError. Yields whether it is held: on a file system without
    locks nothing is.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only what we may write to
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def sweep(parent: Path) -> None:
    """Take away what killed processes have left half-written in a folder; what they were replacing is put back."""
    for path in parent.glob(".*"):
        if path.suffix not in (UNFINISHED, REPLACED):
            continue
        with suppress(OSError), ExitStack() as stack:
            # Whoever made it holds it as long as it lives; where there are no locks, no one can tell.
            if not path.is_symlink() and not stack.enter_context(locked(path, wait=False)):
                continue
            for old in path.iterdir() if path.suffix == REPLACED else ():
                if not (parent / old.name).exists():
                    os.replace(old, parent / old.name)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def claimed(
    parent: Path, name: str, make: Callable[[Path], None] = Path.mkdir, ending: str = UNFINISHED
) -> Iterator[Path]:
    """Make a hidden temporary folder (or what `make` makes) and hold it, so that no `sweep` takes it for a leftover."""
    with ExitStack() as stack:
        while True:
            path = parent / f".{name}.{secrets.token_hex(8)}{ending}"
            make(path)
            with suppress(FileNotFoundError):  # a sweep came between making and locking
                stack.enter_context(locked(path, wait=True))
                if path.exists():
                    break
        yield path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed, on failure it is removed."""
    with readable_errors(path), parents_of(path):
        sweep(path.parent)
        with claimed(path.parent, path.name, Path.touch) as temporary:
            try:
                yield temporary
                fsync_path(temporary)
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
        sweep(target.parent)
        with claimed(target.parent, target.name) as temporary:
            try:
                yield temporary
                for path in sorted(temporary.rglob("*")):
                    fsync_path(path)
                if target.exists():
                    with claimed(target.parent, target.name, ending=REPLACED) as old:
                        os.replace(target, old / target.name)
                        try:
                            os.replace(temporary, target)
                        except OSError:
                            os.replace(old / target.name, target)
                            old.rmdir()
                            raise
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


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a file that is never large."""
    with readable_errors(path), path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise BertlingError(f"{path}: larger than {most >> 20} MiB, which no such file is; name another one")
    return raw


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Load a JSON object; `what` names the file's role in the error."""
    raw = read_bounded(path, MOST_JSON)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BertlingError(f"{path}: this {what} is not valid JSON ({error}); restore or remake it") from error
    if not isinstance(value, dict):
        raise BertlingError(f"{path}: this {what} must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, readable and with a stable order of keys."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
