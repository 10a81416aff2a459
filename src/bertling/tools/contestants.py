"""Who runs in a benchmark of training steps: our own trainer, and the stock class in a plain loop, on the same rows."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertling.batches import Batch, MaskedBatches
from bertling.distributed import Ranks
from bertling.files import BertlingError
from bertling.interop import config_to_hf
from bertling.model import BertForMaskedLM, ModelConfig
from bertling.presets import preset_config
from bertling.runtime import Runtime, choose_dtype, keep_freed_memory
from bertling.samples import SamplesWriter, open_samples
from bertling.settings import Settings
from bertling.tasks import MaskedLMTask
from bertling.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertling.train import Trainer

PHASES = ("data", "forward", "backward", "optimizer")
ROWS = 2048
"""Rows of made-up text that the contestants read, over and over."""


@dataclass(frozen=True)
class Workload:
    """One pre-training step."""

    preset: str
    layers: int
    width: int
    heads: int
    vocab_size: int
    batch_size: int
    seq_len: int
    micro_batch_size: int | None = None
    mlm_probability: float = 0.15
    local_attention: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.preset} {self.layers} x {self.width}, vocabulary {self.vocab_size:,}, "
            f"{self.batch_size} x {self.seq_len} tokens, {self.mlm_probability:.0%} masked"
        )

    def config(self) -> ModelConfig:
        """The model's shape; dropout 0, as when pre-training on fresh text."""
        return preset_config(
            self.preset,
            "mini",
            self.vocab_size,
            max_position_embeddings=self.seq_len,
            pad_token_id=0,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            local_attention=self.local_attention,
            dropout=0.0,
        )


CONTESTANTS = ("ours", "stock", "stock at its best")
"""The stock class at its defaults (fp32, plain AdamW), and with bf16 autocast (where bf16 is the faster format), fused
AdamW, sdpa, torch.compile and, on a CPU, our way with the allocator."""


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def made_up_text(folder: Path, workload: Workload) -> tuple[Path, Tokenizer]:
    """Full rows of ids drawn by Zipf's law, prepared as `bertling prepare` does, and a vocabulary for them."""
    entries = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(workload.vocab_size - len(SPECIAL_TOKENS)))]
    tokenizer = Tokenizer(entries)
    chance = np.random.default_rng(0)
    ids = chance.zipf(1.2, (ROWS, workload.seq_len)) % (workload.vocab_size - len(SPECIAL_TOKENS)) + len(SPECIAL_TOKENS)
    ids[:, 0], ids[:, -1] = tokenizer.cls_id, tokenizer.sep_id
    path = folder / "train_bench"
    path.mkdir(parents=True)
    writer = SamplesWriter(path, seq_len=workload.seq_len, vocab_size=workload.vocab_size, pad_id=tokenizer.pad_id)
    writer.append(ids)
    writer.finish(vocab_fingerprint=tokenizer.fingerprint)
    return path, tokenizer


class Stopwatch:
    """Seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as this phase's."""
        wait(self.device)
        started = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[name] += time.perf_counter() - started


class WatchedTask(MaskedLMTask):
    """The task, with an eye on the clock."""

    watch: Stopwatch

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[list[Batch], int]:
        with self.watch.phase("data"):
            return super().micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.watch.phase("forward"):
            return super().loss(model, batch)


class Ours:
    """The trainer itself, as `bertling pretrain` runs it, in a folder that is thrown away."""

    def __init__(self, workload: Workload, folder: Path, runtime: Runtime, settings: Settings) -> None:
        path, tokenizer = made_up_text(folder, workload)
        samples = open_samples(path)
        task = WatchedTask(
            [samples],
            samples,
            tokenizer,
            batch_size=workload.batch_size,
            seed=0,
            mlm_probability=workload.mlm_probability,
        )
        self.runtime = runtime.describe()
        self.watch = task.watch = Stopwatch(runtime.device)
        model = BertForMaskedLM(workload.config(), torch.Generator().manual_seed(0))
        self.trainer = Trainer(task, model, tokenizer, settings, runtime, Ranks(), folder)
        model.train()
        if runtime.compile:
            model.compile()
        for optimizer in self.trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._optimizer(start=True))
            optimizer.register_step_post_hook(lambda *_: self._optimizer(start=False))

    def _optimizer(self, *, start: bool) -> None:
        wait(self.watch.device)
        now = time.perf_counter()
        if start:
            self._began = now
        else:
            self.watch.seconds["optimizer"] += now - self._began

    def step(self) -> None:
        """One optimizer step."""
        self.trainer.train_step(0.5)
        self.trainer.step += 1


def stock_config(workload: Workload) -> dict[str, Any]:
    """The stock class's config.json. Raises BertlingError where there is no such class, or no transformers."""
    if find_spec("transformers") is None:
        raise BertlingError("--against hf needs transformers: pip install 'bertling[export]'")
    config = config_to_hf(workload.config(), "masked_lm")
    if config["model_type"] == "bertling-seed":
        raise BertlingError("--against hf: the preset seed has no stock class; choose bert, distilbert or modern")
    return config


class Stock:
    """The class of transformers on the same rows and masks, in a plain loop."""

    def __init__(self, workload: Workload, folder: Path, runtime: Runtime, *, best: bool) -> None:
        config = stock_config(workload)
        import transformers

        torch.set_float32_matmul_precision("high" if best else "highest")  # torch's default: no TF32
        path, tokenizer = made_up_text(folder, workload)
        self.batches = MaskedBatches(
            [open_samples(path)],
            batch_size=workload.batch_size,
            seed=0,
            mlm_probability=workload.mlm_probability,
            tokenizer=tokenizer,
        )
        if best and config["model_type"] == "modernbert":
            config["sparse_prediction"] = True  # its own way to spare the vocabulary matrix
        stock = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**config))
        self.model = stock.to(runtime.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=best)
        self.device, self.count = runtime.device, 0
        bf16 = best and choose_dtype("auto", runtime.device) == torch.bfloat16
        self.autocast = torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=bf16)
        self.runtime = f"{'bf16' if bf16 else 'fp32'}, {'compiled' if best else 'eager'}"
        if best:
            self.model.compile()
            if runtime.device.type == "cpu":
                keep_freed_memory()

    def step(self) -> None:
        """One optimizer step over the whole batch at once."""
        batch = self.batches.batch(self.count)
        self.count += 1
        assert batch.wanted is not None
        labels = torch.full((batch.input_ids.numel(),), -100).index_put((batch.wanted,), batch.labels)
        input_ids, labels = batch.input_ids.to(self.device), labels.view_as(batch.input_ids).to(self.device)
        with self.autocast:
            loss = self.model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's, or those of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
