"""What the hardware is and how to use it: device, number format, threads, compilation, seeds."""

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bertling.console import LARGE_PAGES
from bertling.files import BertlingError
from bertling.settings import Settings

# Compiling takes about a minute: runs shorter than this are over before it has paid.
COMPILE_PAYS_MINUTES = 10.0
COMPILE_PAYS_STEPS = 2000
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


@dataclass(frozen=True)
class Runtime:
    """Where and how the model computes."""

    device: torch.device
    dtype: torch.dtype
    """Of the matrix products; in training weights, sums and losses stay in fp32."""
    compile: bool
    int8: bool = False
    """Whether the products of the hidden matrices, in training and in answers, are in int8 instead (int8.py)."""
    notes: tuple[str, ...] = ()
    """What was chosen for the user, and why, one line each."""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model computes in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def describe(self) -> str:
        """One line for the log."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        form = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        how = "compiled" if self.compile else "eager"
        return f"{name}, {torch.get_num_threads()} threads, {'int8 and ' if self.int8 else ''}{form}, {how}"


def build_runtime(settings: Settings, *, local_rank: int = 0, local_processes: int = 1) -> Runtime:
    """Choose device, number format, threads and compilation, as asked or as the hardware has them."""
    device = choose_device(settings.device, local_rank, local_processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # First choice on an H100, it plans anew for each shape of a batch, and gradients may be NaN (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    threads = settings.threads or max(1, available_cores() // local_processes)
    torch.set_num_threads(threads)
    # Who names fp32 gets it in full; elsewhere TF32 may serve the products that autocast leaves in fp32.
    torch.set_float32_matmul_precision("highest" if settings.dtype == "fp32" else "high")
    notes = []
    dtype = choose_dtype(settings.dtype, device)
    if settings.dtype == "fp16" and device.type == "cpu":
        raise BertlingError("dtype = fp16: a CPU trains in bf16 or fp32; choose one of these or auto")
    if settings.dtype == "bf16" and device.type == "cpu" and lacks_bf16():
        notes.append(
            "dtype = bf16: this CPU has no fast instructions for it, so that products take longer than in fp32 "
            "(with AVX2 alone a hundred times as long); auto takes the faster format"
        )
    int8 = settings.dtype == "int8" and device.type == "cpu" and int8_pays()
    if settings.dtype == "int8" and not int8:
        notes.append(
            "dtype = int8 is for CPUs with instructions for it (VNNI) and without AMX, whose bf16 is faster still: "
            "products in the usual format instead"
        )
    wanted = settings.compile == "true" or (settings.compile == "auto" and compile_pays(settings, device))
    if wanted and not can_compile(device):
        missing = "no C++ compiler was found"
        if device.type == "cuda":
            missing = "Triton for this GPU, a compiler for C and C++, or Python's headers (python3-dev) were not found"
        notes.append(f"{missing}, so the model runs uncompiled: the same results, slower steps")
        wanted = False
    if wanted and device.type == "cpu":
        # Threads of compiled code add gradients up in any order otherwise: a resumed run would differ in the last bits.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a cost, no use here
    return Runtime(device, dtype, wanted, int8, tuple(notes))


def keep_freed_memory() -> None:
    """Let a training on a CPU use its memory again instead of handing it back to the system after every step.

    Large blocks are otherwise mapped and zeroed anew each time they are asked for, page by page: up to a quarter of a
    step (docs/experiments.md). glibc's mallopt(3) is told to keep one heap and never to map or trim; torch to ask for
    large pages, which it heeds before its first allocation alone (so the commands that train ask earlier). Other
    systems' allocators are left as they are.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault(*LARGE_PAGES)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(wanted: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device asked for, or the fastest kind at hand; mps is for a single process, for gloo cannot reach it."""
    alone = processes == 1
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": alone and torch.backends.mps.is_available()}
    if wanted != "auto":
        if not has[wanted]:
            here = ", ".join(name for name, there in has.items() if there)
            raise BertlingError(f"device = {wanted}: torch finds none here; it has {here}")
    else:
        wanted = "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    if wanted != "cuda":
        return torch.device(wanted)
    if local_rank >= torch.cuda.device_count():
        raise BertlingError(
            f"nproc: process {local_rank} has no GPU of its own ({torch.cuda.device_count()} here); "
            "lower nproc or use device = cpu"
        )
    return torch.device("cuda", local_rank)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it faster, else fp16 on a GPU, else fp32."""
    if wanted not in {"auto", "int8"}:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: with AMX, and with AVX512-BF16 unless Intel made it.

    With Intel's AVX512-BF16 it takes twice as long as fp32; without such instructions it is emulated, with AVX2 alone
    at a hundredth of the speed (docs/experiments.md).
    Asked of the hardware, not of a clock: every process of a run, and a resumed one, must choose alike.
    """
    has = torch.cpu.get_capabilities()
    by_intel = str(has.get("cpu_name", "")).startswith("Intel")
    return has_amx() or bool(has.get("avx512_bf16", False) and not by_intel)


def lacks_bf16() -> bool:
    """Whether bf16 is known to be slower than fp32 on this CPU; with ARM's instructions for it nobody measured that."""
    return not (multiplies_bf16() or torch.cpu.get_capabilities().get("bf16", False))


def has_amx() -> bool:
    """Whether this CPU multiplies whole tiles of bf16 at once, about four times as fast as fp32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def int8_pays() -> bool:
    """Whether int8 is the fastest format of this CPU: with AMX bf16 is, on the whole (docs/experiments.md)."""
    return multiplies_int8() and not has_amx()


def multiplies_int8() -> bool:
    """Whether this CPU has dot products of int8; without them torch's are slow, and on some their sums overflow."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_vnni", False) or has.get("avx_vnni", False))


def compile_pays(settings: Settings, device: torch.device) -> bool:
    """Whether a run is planned to last long enough: not by its speed so far, so that a resumed run decides alike.

    On a CPU what compiling gains depends on model and batch (docs/experiments.md), so there it is done on request.
    """
    if device.type != "cuda" or settings.task_type != "mlm":  # texts of each length would be compiled anew
        return False
    if settings.max_minutes is not None:
        return settings.max_minutes >= COMPILE_PAYS_MINUTES
    return (settings.max_iters or COMPILE_PAYS_STEPS) >= COMPILE_PAYS_STEPS


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds the C++ compiler it needs, and on a GPU Triton (Volta or later) and its needs."""
    if device.type == "cuda":
        headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        triton = find_spec("triton") and torch.cuda.get_device_capability(device) >= (7, 0)
        if not (triton and headers and compiler):
            return False
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    return sys.platform != "win32" and any(shutil.which(name) for name in names)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout in one step of one process, so that nothing random has to be remembered for a resume."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77 + rank * 0xC2B2AE3D) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    return (mixed * 0x2C1B3C6D) & 0x7FFFFFFF
