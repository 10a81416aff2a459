"""How fast a training step is: time by phase, FLOPs, share of the machine's peak, and ratios against the stock class.

Each contestant lives in a process of its own and keeps still while another one runs; they take turns, round by round.
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bertling.console import LARGE_PAGES
from bertling.files import BertlingError
from bertling.model import ModelConfig
from bertling.presets import preset_config
from bertling.runtime import build_runtime
from bertling.settings import Settings
from bertling.tools.comparisons import ratio_lines, round_by_round
from bertling.tools.contestants import CONTESTANTS, PHASES, Ours, Stock, Workload, peak_memory, stock_config, wait

Say = Callable[[str], None]
STEPS, WARM_UP = 3, 2
"""Steps in a turn, and those before the first that are not counted; compiling falls into them."""
WORKLOADS: tuple[Workload, ...] = (
    Workload("bert", 6, 768, 12, 30_522, 16, 128),
    Workload("bert", 4, 256, 4, 8192, 64, 128, micro_batch_size=16),
    Workload("modern", 4, 256, 4, 8192, 48, 128, micro_batch_size=16, local_attention=16),
)
"""What `bertling bench` measures when nothing is said."""


def sized_workload(
    preset: str,
    size: str = "mini",
    vocab_size: int = 8192,
    batch_size: int = 64,
    seq_len: int = 128,
    micro_batch_size: int | None = None,
) -> Workload:
    """A workload by the names of preset and size."""
    config = preset_config(preset, size, vocab_size, max_position_embeddings=seq_len, pad_token_id=0)
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    return Workload(preset, *shape, vocab_size, batch_size, seq_len, micro_batch_size)


def flops(config: ModelConfig, rows: int, length: int, masked: int) -> float:
    """Floating-point operations of one step's matrix products, forward and backward (three times forward).

    Counted from shapes, two per multiply-add, and only what has to be computed: blocks with windows look no further,
    the last one works on the masked places alone after its attention, and only these meet the vocabulary.
    """
    width, inner, tokens = config.hidden_size, config.intermediate_size, rows * length
    window = min(length, 2 * (config.local_attention // 2) + 1)
    seen = sum(window if config.is_local(i) else length for i in range(config.num_hidden_layers))
    mixing = 2 * 2 * tokens * seen * width  # q k^T and the weighted sum of v
    rest = 2 * width * width + 2 * (3 if config.glu else 2) * width * inner  # a token's out_proj and MLP
    blocks = config.num_hidden_layers * 2 * 3 * width * width * tokens + mixing
    blocks += rest * ((config.num_hidden_layers - 1) * tokens + masked)
    head = masked * 2 * width * (config.vocab_size + (width if config.mlm_dense else 0))
    return 3.0 * (blocks + head)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The most FLOP/s (of integers as well) that this machine shows on a large square product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    best = float("inf")
    for _ in range(12):
        wait(device)
        started = time.perf_counter()
        multiply(a, b)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def work(kind: str, workload: Workload, given: dict[str, Any], folder: Path, pipe: Connection) -> None:
    """A contestant's process: on each word from the pipe run a turn of steps, and tell how it went."""
    if kind != CONTESTANTS[1]:
        os.environ.setdefault(*LARGE_PAGES)
    try:
        settings = Settings(
            batch_size=workload.batch_size,
            micro_batch_size=workload.micro_batch_size,
            max_iters=10**6,
            **given,
        )
        runtime = build_runtime(settings)
        contestant: Ours | Stock
        if kind == "ours":
            contestant = Ours(workload, folder, runtime, settings)
        else:
            contestant = Stock(workload, folder, runtime, best=kind == CONTESTANTS[2])
        started = time.perf_counter()
        for _ in range(WARM_UP):
            contestant.step()
        wait(runtime.device)
        warm_up = time.perf_counter() - started
        if isinstance(contestant, Ours):
            contestant.watch.seconds = dict.fromkeys(PHASES, 0.0)
        pipe.send({"warm_up": warm_up, "runtime": contestant.runtime})
        while pipe.recv():
            wait(runtime.device)
            started = time.perf_counter()
            for _ in range(STEPS):
                contestant.step()
            wait(runtime.device)
            told: dict[str, Any] = {"seconds": (time.perf_counter() - started) / STEPS}
            if isinstance(contestant, Ours):
                told["phases"] = dict(contestant.watch.seconds)
            told["memory"] = peak_memory(runtime.device)
            pipe.send(told)
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


@dataclass(frozen=True)
class Measured:
    """One contestant on one workload."""

    contestant: str
    runtime: str
    tokens_per_second: float
    """Median over the rounds; no token is padding."""
    slowest: float
    fastest: float
    milliseconds: dict[str, float]
    """A step, and for ours its phases; what is left of them is `backward`, the norm of the gradient included."""
    warm_up_seconds: float
    """The first steps, compiling among them."""
    peak_bytes: int
    seconds: list[float]
    """A step, in each round."""


@dataclass(frozen=True)
class Report:
    """A workload, its contestants, and the machine's peak beside them."""

    workload: Workload
    flops_per_step: float
    peaks: list[float]
    """FLOP/s of the machine's matrix products, measured right before our turn in each round."""
    contestants: list[Measured]

    @property
    def peak_flops(self) -> float:
        """The median of them."""
        return statistics.median(self.peaks)

    @property
    def mfu(self) -> float:
        """Share of the peak that our step's matrix products use: the median over the rounds, each by its own peak."""
        rounds = zip(self.contestants[0].seconds, self.peaks, strict=True)
        return statistics.median(self.flops_per_step / seconds / peak for seconds, peak in rounds)

    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """How many times as fast we are: median, lowest and highest over the rounds, each round for itself."""
        return round_by_round({one.contestant: one.seconds for one in self.contestants})

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "peak_flops": self.peak_flops, "mfu": self.mfu, "ratios": self.ratios()}

    def text(self) -> str:
        """A few lines."""
        lines = [str(self.workload)]
        for one in self.contestants:
            lines.append(
                f"  {one.contestant:<18}{one.tokens_per_second:>9,.0f} tokens/s ({one.slowest:,.0f} to "
                f"{one.fastest:,.0f})  {one.runtime}; memory {one.peak_bytes / 1e9:.2f} GB; first {WARM_UP} steps "
                f"{one.warm_up_seconds:.1f} s"
            )
        phases = ", ".join(f"{name} {value:.1f}" for name, value in self.contestants[0].milliseconds.items())
        lines.append(f"  our milliseconds: {phases}")
        lines.append(
            f"  {self.flops_per_step / 1e9:,.1f} GFLOP a step; measured peak {self.peak_flops / 1e9:,.0f} GFLOP/s; "
            f"used {self.mfu:.1%}"
        )
        return "\n".join(lines + ratio_lines(self.ratios()))


def bench(workload: Workload, *, against: bool, rounds: int, settings: dict[str, Any], say: Say) -> Report:
    """Let the contestants take turns on a workload; each runs a few steps in each of the rounds."""
    kinds = CONTESTANTS if against else CONTESTANTS[:1]
    if against:
        stock_config(workload)  # what has none is refused before anything is measured
    context = multiprocessing.get_context("spawn")
    folder = tempfile.TemporaryDirectory()  # ours, since the contestants may be killed
    pipes, processes = {}, []
    told: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    try:
        for kind in kinds:
            say(f"{workload}: {kind} gets ready")
            pipes[kind], far = context.Pipe()
            process = context.Process(
                target=work, args=(kind, workload, settings, Path(folder.name, kind), far), daemon=True
            )
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits that: we answer Ctrl-C
            process.start()
            signal.signal(signal.SIGINT, interrupt)
            processes.append(process)
            far.close()  # so that the pipe ends with the child
            told[kind].append(heard(pipes[kind], kind))  # one after the other: compiling would disturb the next
        runtime = build_runtime(Settings(**settings))
        peaks = []
        for number in range(rounds):
            say(f"{workload}: round {number + 1} of {rounds}")
            peaks.append(matmul_peak(runtime.device, torch.int8 if runtime.int8 else runtime.dtype))
            for kind in kinds:
                pipes[kind].send(True)
                told[kind].append(heard(pipes[kind], kind))
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(False)
        for process in processes:
            process.join(10)
            process.kill()
            process.join()
        folder.cleanup()
    masked = workload.batch_size * round(workload.mlm_probability * (workload.seq_len - 2))
    count = flops(workload.config(), workload.batch_size, workload.seq_len, masked)
    return Report(workload, count, peaks, [summed_up(workload, kind, told[kind]) for kind in kinds])


def heard(pipe: Any, kind: str) -> dict[str, Any]:
    """What a contestant tells; an error of its is ours."""
    try:
        told: dict[str, Any] = pipe.recv()
    except EOFError:
        raise BertlingError(f"{kind}: its process ended, perhaps for want of memory; lower the batch size") from None
    if "error" in told:
        raise BertlingError(f"{kind}: {told['error']}")
    return told


def summed_up(workload: Workload, kind: str, told: list[dict[str, Any]]) -> Measured:
    """One contestant's rounds as figures."""
    first, rounds = told[0], told[1:]
    seconds = [one["seconds"] for one in rounds]
    speeds = sorted(workload.batch_size * workload.seq_len / one for one in seconds)
    step = 1000 * statistics.mean(seconds)
    milliseconds = {"step": step}
    if "phases" in rounds[-1]:
        each = {name: 1000 * value / (STEPS * len(rounds)) for name, value in rounds[-1]["phases"].items()}
        each["backward"] = step - sum(each.values())
        milliseconds |= each
    return Measured(
        kind,
        first["runtime"],
        statistics.median(speeds),
        speeds[0],
        speeds[-1],
        milliseconds,
        first["warm_up"],
        rounds[-1]["memory"],
        seconds,
    )
