"""Several processes: who am I, sums over all of us, and the launch through torchrun."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bertling.files import BertlingError
from bertling.settings import Settings


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


def launch(settings: Settings, explicit: Iterable[str], arguments: Sequence[str]) -> int:
    """Start `bertling ARGUMENTS` on several processes of this machine through torchrun; returns the exit status."""
    count = settings.nproc or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
    if settings.batch_size < count:
        raise BertlingError(
            f"batch-size = {settings.batch_size} is less than one row for each of the {count} "
            "processes: raise batch-size or lower nproc"
        )
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    if {"dist_master_addr", "dist_master_port"} & set(explicit):
        command += [f"--master-addr={settings.dist_master_addr}", f"--master-port={settings.dist_master_port or 29500}"]
    else:
        command += ["--standalone"]
    # torchrun warns about threads unless told; each process sets its own count of them.
    environment = {"OMP_NUM_THREADS": str(settings.threads or 1), **os.environ}
    return subprocess.run([*command, "-m", "bertling", *arguments], env=environment, check=False).returncode
