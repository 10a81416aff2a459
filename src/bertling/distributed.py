"""Several processes: who am I, sums over all of us, and the launch through torchrun."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from bertling.console import is_rank
from bertling.files import BertlingError, one_line
from bertling.settings import Settings

LAUNCHER = "BERTLING_LAUNCHER"
"""Tells the processes the number of the one that launched them."""
SECONDS_TO_SAVE = 600
"""How long a process may take to save after a signal, before it is killed."""


@dataclass(frozen=True)
class Ranks:
    """This process among all; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_processes: int = 1
    control: dist.ProcessGroup | None = None
    """For words among the processes: on their CPUs, so that no GPU has to be waited for."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            with together():
                dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up every parameter's gradient over all processes, as if one process had seen the whole batch.

        Gradients travel as one flat tensor: once per optimizer step, however many micro-batches there were.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        with together():
            dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def from_first(self, values: list[float]) -> list[float]:
        """The first process's numbers, on every process (its clock decides when a run by time ends)."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        with together():
            dist.broadcast(tensor, src=0, group=self.control)
        return [float(value) for value in tensor.tolist()]

    def text_from_first(self, text: str) -> str:
        """The first process's text, on every process."""
        size = int(self.from_first([float(len(text.encode()))])[0])
        codes = self.from_first([float(code) for code in text.encode()[:size].ljust(size)])
        return bytes(int(code) for code in codes).decode()

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what takes all processes: that another one ended is one line here, where it ended is the cause."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no kind of their own for it
        raise BertlingError(
            "another process of this training ended or does not answer; what it said last is the cause "
            f"({one_line(error)})"
        ) from error


def join(settings: Settings) -> Ranks:
    """Meet the other processes if torchrun started this one, else be alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if is_rank():
        watch_launcher()
    try:
        local_rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ["WORLD_SIZE"])
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    except ValueError:
        raise BertlingError("RANK, WORLD_SIZE: must be whole numbers, as a launcher sets them; or unset both") from None
    check_processes(settings, world_size, local_processes)
    on_gpu = wants_gpu(settings)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=torch.device("cuda", local_rank) if on_gpu else None
        )
    except (ValueError, RuntimeError) as error:
        raise BertlingError(
            f"the processes could not meet ({one_line(error)}): RANK and WORLD_SIZE are set, as if torchrun had "
            "started this one; unset them, or give --ddp and let bertling start the processes"
        ) from error
    control = dist.new_group(backend="gloo") if on_gpu else None
    return Ranks(int(os.environ["RANK"]), world_size, local_rank, local_processes, control)


def watch_launcher() -> None:
    """End this process when its launcher is gone; else it would go on, holding its GPU and the run."""
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # it may be gone by now

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def wants_gpu(settings: Settings) -> bool:
    """Whether the processes are to compute on GPUs."""
    return settings.device in {"auto", "cuda"} and torch.cuda.is_available()


def check_processes(settings: Settings, world_size: int, local_processes: int) -> None:
    """Each process needs a row of the batch, and a GPU of its own where GPUs are used."""
    if settings.device == "mps" and world_size > 1:
        raise BertlingError("device = mps: several processes cannot train on it together; give device = cpu, or no ddp")
    if settings.batch_size < world_size:
        raise BertlingError(
            f"batch-size = {settings.batch_size} is less than one row for each of the {world_size} processes: raise "
            "batch-size or lower nproc"
        )
    if wants_gpu(settings) and local_processes > torch.cuda.device_count():
        raise BertlingError(
            f"nproc = {local_processes}: there are {torch.cuda.device_count()} GPUs here, and each process needs its "
            "own; lower nproc, or give device = cpu"
        )


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun started this process."""
    return is_rank() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def launch(settings: Settings, arguments: Sequence[str]) -> int:
    """Run `bertling ARGUMENTS` on several processes of this machine through torchrun.

    Returns the exit status of the process that failed first, or minus the number of the signal that ended them all.
    torchrun runs inside this process: it passes signals on and waits for the processes to save.
    """
    from torch.distributed.run import main as torchrun

    count = settings.nproc or (torch.cuda.device_count() if wants_gpu(settings) else 2)
    check_processes(settings, count, count)
    options = [f"--nproc-per-node={count}", f"--shutdown-timeout={SECONDS_TO_SAVE}"]
    if settings.dist_master_port is not None or settings.dist_master_addr != "127.0.0.1":
        options += [f"--master-addr={settings.dist_master_addr}", f"--master-port={settings.dist_master_port or 29500}"]
    else:
        options += ["--standalone"]
    try:
        socket.getaddrinfo(settings.dist_master_addr, None)
    except (OSError, UnicodeError):
        raise BertlingError(f"dist-master-addr = {settings.dist_master_addr}: no such host; name one") from None
    # torchrun warns about threads unless told; each process sets its own count of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads or 1))
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        # Behind "--", or torchrun would take our flags for abbreviations of its own.
        torchrun([*options, "-m", "--", "bertling", *arguments])
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # a killed process has a negative one
    except SignalException as signal:
        return -int(signal.sigval)
    except dist.DistError as error:
        raise BertlingError(
            f"dist-master-port: the processes could not meet ({one_line(error)}); is another training using this port?"
        ) from error
    finally:
        del os.environ[LAUNCHER]
    return 0
