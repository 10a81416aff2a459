"""Several processes: who am I, sums over all of us, and the launch through torchrun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from bertling.files import BertlingError
from bertling.settings import Settings

SECONDS_TO_SAVE = 600
"""How long a process may take to save after a signal, before it is killed."""


@dataclass(frozen=True)
class Ranks:
    """This process among all; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_processes: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up every parameter's gradient over all processes, as if one process had seen the whole batch.

        Gradients travel as one flat tensor: once per optimizer step, however many micro-batches there were.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def from_first(self, values: list[float]) -> list[float]:
        """The first process's numbers, on every process (its clock decides when a run by time ends)."""
        if self.world_size == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.broadcast(tensor, src=0)
        return [float(value) for value in tensor.tolist()]

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def join(settings: Settings) -> Ranks:
    """Meet the other processes if torchrun started this one, else be alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = Ranks(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        local_rank,
        int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    )
    if settings.batch_size < ranks.world_size:
        raise BertlingError(
            f"batch-size = {settings.batch_size} is less than one row for each of the "
            f"{ranks.world_size} processes: raise batch-size or lower nproc"
        )
    on_gpu = settings.device in {"auto", "cuda"} and torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", device_id=torch.device("cuda", local_rank) if on_gpu else None
    )
    return ranks


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def launch(settings: Settings, arguments: Sequence[str]) -> int | None:
    """Run `bertling ARGUMENTS` on several processes of this machine through torchrun.

    Returns the exit status of the process that failed first, or None if signals ended them (each has saved then).
    torchrun runs inside this process: it passes signals on and waits for the processes to save.
    """
    from torch.distributed.run import main as torchrun

    count = settings.nproc or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
    if settings.batch_size < count:
        raise BertlingError(
            f"batch-size = {settings.batch_size} is less than one row for each of the {count} "
            "processes: raise batch-size or lower nproc"
        )
    options = [f"--nproc-per-node={count}", f"--shutdown-timeout={SECONDS_TO_SAVE}"]
    if settings.dist_master_port is not None or settings.dist_master_addr != "127.0.0.1":
        options += [f"--master-addr={settings.dist_master_addr}", f"--master-port={settings.dist_master_port or 29500}"]
    else:
        options += ["--standalone"]
    # torchrun warns about threads unless told; each process sets its own count of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads or 1))
    try:
        # Behind "--", or torchrun would take our flags for abbreviations of its own.
        torchrun([*options, "-m", "--", "bertling", *arguments])
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # a killed process has a negative one
    except SignalException:
        return None
    return 0
