"""Where a run's numbers go besides its own files: TensorBoard, and Weights & Biases on request."""

import io
import netrc
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bertling.files import BertlingError, atomic_write


class EventFile:
    """A TensorBoard event file, written in the foreground so that a full disk is met here and not in a thread."""

    def __init__(self, logs: Path, append: Callable[[Path, bytes], None]) -> None:
        from tensorboard.compat.proto import event_pb2

        # Readers take the files in the order of their names.
        self._path = logs / f"events.out.tfevents.{time.time():017.6f}.{platform.node()}"
        self._append = append
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def begin(self, first_step: int) -> None:
        """Make readers forget events of this step and later ones, which are told once more."""
        from tensorboard.compat.proto import event_pb2

        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        points = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = summary_pb2.Summary(value=points)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        for event in events:
            RecordWriter(buffer).write(event.SerializeToString())
        self._append(self._path, buffer.getvalue())


def start_wandb(folder: Path, run_name: str, settings: dict[str, Any]) -> Any:
    """Start a Weights & Biases run, or go on with it; offline without an API key, so that it never asks for a login.

    Whoever logs to it gives the training's `step` among the values: W&B's own count could not go back.
    """
    try:
        import wandb
    except ImportError as error:
        raise BertlingError("wandb: the package is not installed; pip install wandb, or set wandb = false") from error
    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    folder.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", "bertling")
    quiet = wandb.Settings(silent=True)
    known = folder / "logs" / "wandb-id"
    same = known.read_text().strip() if known.exists() else secrets.token_hex(4)
    where = {"project": project, "name": run_name, "id": same, "resume": "allow", "dir": str(folder), "mode": mode}
    try:
        run = wandb.init(**where, config=settings, settings=quiet)
        run.define_metric("*", step_metric="step")
    except Exception as error:
        raise BertlingError(f"wandb: it did not start ({error}); set WANDB_MODE=offline, or wandb = false") from error
    atomic_write(known, same)
    return run


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
