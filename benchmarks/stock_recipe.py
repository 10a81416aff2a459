"""What the usual recipe reaches in the same minutes: the stock BERT of the same size, by the Trainer of transformers.

    python benchmarks/stock_recipe.py --work titles --minutes 10 --how best --output stock-best
    bertling evaluate --cp stock-best --data titles/datasets/val_enwiki_128_123

It reads the rows that `bertling prepare` wrote, so both sides see the same text in the same tokens, and leaves a model
that `bertling evaluate` scores by the same protocol. Needs `pip install 'bertling[bench]'`.

`defaults` are those of run_mlm.py: 8 rows a step, AdamW at 5e-5, falling linearly from the first step, fp32. `best`
chooses among its public settings: 64 rows, 1e-3, 6 % of the steps to warm up, weight decay 0.01, bf16 where that is
the faster format, fused AdamW, torch.compile. How many steps fit into the minutes is measured beforehand; neither that
nor the first step, in which it compiles, is counted.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bertling.runtime import choose_device, choose_dtype, keep_freed_memory
from bertling.samples import Samples, open_samples

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"per_device_train_batch_size": 8},
    "best": {
        "per_device_train_batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 0.06,  # a share, being below 1
        "weight_decay": 0.01,
        "bf16": choose_dtype("auto", choose_device("auto")) == torch.bfloat16,
        "optim": "adamw_torch_fused",
        "torch_compile": True,
    },
}
PROBE = 30
"""Steps that are timed, but for the first third of them."""


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Prepared rows as the Trainer reads them."""

    def __init__(self, samples: Samples, special_ids: tuple[int, ...]) -> None:
        self.samples, self.special = samples, torch.tensor(special_ids)

    def __len__(self) -> int:
        return self.samples.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.from_numpy(self.samples.fetch(np.array([index]))[0])
        return {"input_ids": ids, "special_tokens_mask": torch.isin(ids, self.special).long()}


class Clock(transformers.TrainerCallback):
    """Remembers when each step ended, and ends the training when its time is over, counted from the first of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())
        control.should_training_stop |= self.times[-1] - self.times[0] > self.seconds
        if state.global_step % 100 == 0:
            left = state.max_steps - state.global_step
            rate = (self.times[-1] - self.times[0]) / state.global_step
            print(f"step {state.global_step:,} of {state.max_steps:,}, {left * rate / 60:.1f} minutes left", flush=True)


def train(options: argparse.Namespace, steps: int, seconds: float) -> tuple[Any, list[float]]:
    """A fresh model, trained for so many steps, or as long as the clock allows; and when its steps ended."""
    torch.manual_seed(options.seed)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(str(options.work / "vocab"))
    (data,) = (options.work / "datasets").glob("train_*")
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    chosen = dict(SETTINGS[options.how])
    if options.rows is not None:
        chosen["per_device_train_batch_size"] = options.rows
    arguments = transformers.TrainingArguments(
        str(options.output),
        max_steps=steps,
        seed=options.seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **chosen,
    )
    clock = Clock(seconds)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(open_samples(data), tuple(tokenizer.all_special_ids)),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return trainer, clock.times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder with vocab/ and datasets/")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--how", choices=list(SETTINGS), required=True)
    parser.add_argument("--rows", type=int, help="rows a step, instead of the 8 or 64 above")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    _, times = train(options, PROBE, 1e9)
    each = (times[-1] - times[PROBE // 3]) / (PROBE - 1 - PROBE // 3)
    steps = int(60 * options.minutes / each)
    print(f"{each:.3f} s a step: {steps:,} steps in {options.minutes:g} minutes", flush=True)
    trainer, times = train(options, steps, 60 * options.minutes)
    trainer.save_model(str(options.output))
    trainer.processing_class.save_pretrained(str(options.output))
    print(f"{len(times):,} steps in {(times[-1] - times[0]) / 60:.1f} minutes -> {options.output}")


if __name__ == "__main__":
    main()
