"""Checkpoints: saved atomically, verified, rotated, loaded; each one is a Hugging Face model folder."""

import hashlib
import os
import pickle  # for the name of its error alone
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from bertling.files import (
    UNFINISHED,
    BertlingError,
    atomic_folder,
    fsync_path,
    read_json,
    readable_errors,
    write_json,
)
from bertling.interop import LoadReport, from_hf, to_hf, unwrap
from bertling.model import BertEncoder
from bertling.stock import Head
from bertling.tokenizer import Tokenizer

MANIFEST = "manifest.json"
STATE = "training_state"
NEEDED = {"config.json", "model.safetensors", "vocab.txt", f"{STATE}.json", f"{STATE}.safetensors"}
"""What the manifest of a run's checkpoint names, or it has been tampered with."""


@dataclass(frozen=True)
class TrainingState:
    """What a run needs, besides the weights, to go on as if it had never stopped."""

    numbers: dict[str, Any]
    """Step, seconds, best score, settings: plain JSON."""
    tensors: dict[str, Tensor]
    """The optimizers' tensors under flat names."""

    def check_data(self, run: Path, data: Sequence[tuple[str, int, str]]) -> None:
        """Refuse to go on with data sets (name, rows, sum of the content) other than those that the run was trained on.

        A sum is "" where it was not taken.
        """
        for (name, rows, content), known in zip(data, self.numbers.get("data") or data, strict=True):
            before, rows_before, content_before = (*known, "")[:3]
            same = (name, rows) == (before, rows_before)
            if not same or (content and content_before and content != content_before):
                raise BertlingError(
                    f"{run}: was trained on {before} of {rows_before:,} rows, and now it is {name} of {rows:,}"
                    f"{' others' if same else ''}; put the data back, or start a new run from its weights with --cp "
                    "and a new --run-id"
                )


@dataclass(frozen=True)
class Loaded:
    """A model out of a checkpoint folder."""

    folder: Path
    model: BertEncoder
    tokenizer: Tokenizer
    report: LoadReport


def save_checkpoint(
    checkpoints: Path,
    step: int,
    model: nn.Module,
    tokenizer: Tokenizer,
    state: TrainingState,
    *,
    best: bool,
    keep: int,
) -> Path:
    """Write `step-NNNNNNN`, verify it, point `last` (and `best`) at it, and delete what exceeds `keep`."""
    folder = checkpoints / f"step-{step:07d}"
    with atomic_folder(folder, force=True) as temporary, readable_errors(folder):
        write_model(temporary, model, tokenizer)
        (temporary / f"{STATE}.safetensors").write_bytes(save(plain(state.tensors)))
        write_json(temporary / f"{STATE}.json", state.numbers)
        write_manifest(temporary)
        verify(temporary)
    if best or not (checkpoints / "best").exists():
        point(checkpoints / "best", folder)  # before `last`: killed in between, a resumed run comes to this step again
    point(checkpoints / "last", folder)
    rotate(checkpoints, keep)
    return folder


def write_model(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write config.json, model.safetensors (fp32, the tokenizer's vocabulary size) and the tokenizer's files."""
    config, weights = to_hf(model)
    (folder / "model.safetensors").write_bytes(save(plain(weights), metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    shape = unwrap(model).config
    tokenizer.save(folder, token_types=shape.type_vocab_size > 0, max_length=shape.max_position_embeddings)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a safetensors file takes them: on the CPU, contiguous, none sharing memory."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def write_manifest(folder: Path) -> None:
    """Record the size and SHA-256 of every file in the folder."""
    entries = {}
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        entries[path.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    write_json(folder / MANIFEST, {"format": 1, "files": entries})


def verify(folder: Path, *, ours: bool = False) -> None:
    """Check every file against the manifest, which only a folder that is not `ours` may lack."""
    if not ours and not (folder / MANIFEST).exists():
        return
    files = read_json(folder / MANIFEST, "checkpoint manifest").get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise BertlingError(f"{folder / MANIFEST}: does not list files; use another checkpoint")
    if ours and not files.keys() >= NEEDED:
        raise BertlingError(f"{folder / MANIFEST}: does not list {min(NEEDED - files.keys())}; use another checkpoint")
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise BertlingError(f"{path}: missing from this checkpoint; use another one, or the run's 'last'")
        with readable_errors(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_size != entry.get("bytes") or digest != entry.get("sha256"):
            raise BertlingError(
                f"{path}: damaged or truncated ({path.stat().st_size:,} bytes, checksum differs); use "
                "another checkpoint of the run"
            )


def point(link: Path, folder: Path) -> None:
    """Make a relative link, or swing an existing one over, in one step; a copy of a run may have folders for links."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}{UNFINISHED}")
    with readable_errors(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        if link.is_dir() and not link.is_symlink():  # its step folder holds the same
            shutil.rmtree(link)
        os.replace(temporary, link)
        fsync_path(link.parent)


def go_back_to(checkpoints: Path, step: int, best_step: int) -> None:
    """Where a run goes on from before its last step, let `last` (and a `best` of later) forget what is given up.

    Once the log ends there too, a process that is killed before its next checkpoint leaves both in agreement.
    """
    folder, best = (checkpoints / f"step-{number:07d}" for number in (step, best_step))
    for name, target in (("best", best if best.is_dir() else folder), ("last", folder)):
        link = checkpoints / name
        if folder.is_dir() and link.is_symlink() and link.readlink().name > folder.name:
            point(link, target)


def step_folders(checkpoints: Path) -> list[Path]:
    """The step folders, oldest first."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def rotate(checkpoints: Path, keep: int) -> None:
    """Delete the oldest step folders beyond `keep`, never the ones that `best` and `last` point at."""
    held = {(checkpoints / name).resolve() for name in ("best", "last")}
    best = (checkpoints / "best").resolve()
    others = [path for path in step_folders(checkpoints) if path.resolve() != best]
    for path in others[:-keep]:
        if path.resolve() not in held:
            shutil.rmtree(path, ignore_errors=True)


def newest_intact(checkpoints: Path) -> tuple[Path, list[str]]:
    """The checkpoint of a run to go on from, and what is wrong with newer ones.

    It is the one that `last` points at; where that is damaged, the one before, and so on.
    """
    folders = step_folders(checkpoints)[::-1]
    last = next((path for path in folders if path.resolve() == (checkpoints / "last").resolve()), None)
    if last is not None:  # newer ones than the last are of a course that was given up
        at = folders.index(last)
        folders = folders[at:] + folders[:at]
    faults: list[str] = []
    for folder in folders:
        try:
            verify(folder, ours=True)
            return folder, faults
        except BertlingError as error:
            faults.append(str(error))
    raise BertlingError(
        f"{checkpoints}: holds no intact checkpoint"
        + (f" ({faults[0]})" if faults else "")
        + "; start a new run, or restore the folder from a copy"
    )


def find_checkpoint(path: Path, prefer: str) -> Path:
    """The checkpoint that a run folder, its checkpoints folder or a checkpoint folder means."""
    for candidate in (path, path / prefer, path / "checkpoints" / prefer):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.exists():
        raise BertlingError(f"{path}: no such folder; --cp takes a run, a checkpoint or a Hugging Face model folder")
    if path.is_file():
        raise BertlingError(f"{path}: this is a file; --cp takes the folder of a run or of a checkpoint")
    raise BertlingError(f"{path}: holds no checkpoint (no config.json); name a run or a checkpoint folder")


def run_of(folder: Path) -> Path | None:
    """The run folder that a checkpoint folder lies in, if it does."""
    parent = folder.resolve().parent
    return parent.parent if parent.name == "checkpoints" and (parent.parent / "run.json").is_file() else None


def load_checkpoint(
    folder: Path,
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    dropout: float | None = None,
    generator: torch.Generator | None = None,
    variant: str | None = None,
) -> Loaded:
    """Load a checkpoint or any Hugging Face folder of a known architecture, checking every file, key and shape.

    `head` asks for this head (or none) whatever the folder holds: what is fresh then is drawn from `generator` and
    reported. `variant` names the weights to take where a folder holds several, as in transformers.
    """
    folder = find_checkpoint(folder, "best")
    verify(folder)
    config = read_json(folder / "config.json", "model configuration")
    weights = read_weights(folder, variant)
    tokenizer = Tokenizer.load(folder)
    try:
        model, report = from_hf(
            config, weights, head=head, num_labels=num_labels, id2label=id2label, dropout=dropout, generator=generator
        )
    except BertlingError as error:
        raise BertlingError(f"{folder}: {error}") from None
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise BertlingError(f"{folder}: {name} holds values that are not finite; use another checkpoint")
    size = int(config["vocab_size"])
    if tokenizer.vocab_size > size:
        raise BertlingError(
            f"{folder}: its vocabulary has {tokenizer.vocab_size:,} entries but its model only "
            f"{size:,}: these files do not belong together; use the vocab.txt that it was saved with"
        )
    return Loaded(folder, model, tokenizer, report)


def read_weights(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The weights of a model folder: model.safetensors, several such files, or the older pytorch_model.bin."""
    if variant is not None:
        return read_split(folder / f"model.safetensors.index.{variant}.json")
    new, old, split = (
        folder / name for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
    )
    if split.exists() and not new.exists():
        return read_split(split)
    if new.exists() or not old.exists():
        return read_tensors(new)
    with readable_errors(old), old.open("rb"):
        pass
    try:
        # Only tensors and plain containers are built: whatever else the file asks for, it is refused and not run.
        weights = torch.load(old, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, OSError) as error:
        raise BertlingError(
            f"{old}: damaged, or holds more than tensors, and was not read ({type(error).__name__}); "
            "save the model again as model.safetensors"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise BertlingError(f"{old}: holds no table of tensors; save the model again as model.safetensors")
    return dict(weights)


def read_split(index: Path) -> dict[str, Tensor]:
    """The weights that an index finds in several safetensors files of its folder."""
    places = read_json(index, "index of weights").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise BertlingError(f"{index}: does not say which file holds which weight; save the model again")
    strange = [name for name in places.values() if Path(name).name != name]
    if strange:
        raise BertlingError(f"{index}: names {strange[0]}, which does not lie in its folder; save the model again")
    files = {name: read_tensors(index.with_name(name)) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in files[name]:
            raise BertlingError(f"{index}: {key} is not in {name}; use files that belong together")
    return {key: files[name][key] for key, name in places.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    if not path.exists():
        raise BertlingError(f"{path}: missing; a checkpoint holds its weights in model.safetensors")
    with readable_errors(path):
        raw = path.read_bytes()
    try:
        tensors: dict[str, Tensor] = load(raw)
        return tensors
    except (SafetensorError, ValueError, KeyError) as error:
        raise BertlingError(f"{path}: damaged or truncated ({error}); use another checkpoint") from None


def load_state(folder: Path) -> TrainingState | None:
    """The training state of a verified checkpoint; None if it has none (a plain Hugging Face folder)."""
    if not (folder / f"{STATE}.json").exists():
        return None
    return TrainingState(
        read_json(folder / f"{STATE}.json", "training state"), read_tensors(folder / f"{STATE}.safetensors")
    )
