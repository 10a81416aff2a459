"""The programs that `bertling bench` runs, each in a process of its own: python -m bertling.tools.programs NAME JSON.

They are written as users of these libraries write them: those of others after the scripts and guides of transformers,
with the fastest of their public options; ours call what the command line calls. Each prints one line of JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 10
"""Steps of a training, or batches, before the clock starts."""


def stock_tokenizer(vocab: str) -> Any:
    """BertTokenizerFast on a vocabulary folder of ours."""
    import transformers

    return transformers.BertTokenizerFast.from_pretrained(vocab)


def prepare(text: str, vocab: str, folder: str, length: int, processes: int) -> dict[str, Any]:
    """Text to rows of ids by `datasets.map`, as run_mlm.py of transformers does it."""
    from datasets import load_dataset

    tokenizer = stock_tokenizer(vocab)

    def tokenize(batch: dict[str, Any]) -> Any:
        return tokenizer(
            batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        ids, size = [i for row in batch["input_ids"] for i in row], length - 2
        starts = range(0, len(ids) - size + 1, size)
        return {"input_ids": [[tokenizer.cls_token_id, *ids[i : i + size], tokenizer.sep_token_id] for i in starts]}

    data = load_dataset("text", data_files=text, split="train", cache_dir=folder)
    data = data.map(tokenize, batched=True, num_proc=processes, remove_columns=["text"])
    data = data.map(group, batched=True, num_proc=processes, remove_columns=data.column_names)
    return {"rows": len(data)}


def batches_theirs(vocab: str, rows: str, steps: int, batch: int, workers: int) -> dict[str, Any]:
    """Masked batches from a DataLoader with transformers' collator, the special tokens marked beforehand."""
    import numpy as np
    import torch
    import transformers

    tokenizer = stock_tokenizer(vocab)
    ids = torch.from_numpy(np.load(rows))
    special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
    each = [{"input_ids": a, "special_tokens_mask": b} for a, b in zip(ids, special.long(), strict=True)]
    more: dict[str, Any] = {"persistent_workers": True} if workers else {}
    loader: Any = torch.utils.data.DataLoader(
        each,  # type: ignore[arg-type]
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        **more,
    )

    def endless() -> Any:
        while True:
            yield from loader

    return clocked(endless(), steps)


def batches_ours(data: str, vocab: str, steps: int, batch: int) -> dict[str, Any]:
    """The batches of `bertling pretrain`."""
    from bertling.batches import MaskedBatches
    from bertling.samples import open_samples
    from bertling.tokenizer import Tokenizer

    batches = MaskedBatches(
        [open_samples(Path(data))],
        batch_size=batch,
        seed=0,
        mlm_probability=0.15,
        tokenizer=Tokenizer.load(Path(vocab)),
    )
    return clocked((batches.batch(step) for step in range(WARM_UP + steps)), steps)


def clocked(batches: Any, steps: int) -> dict[str, Any]:
    """Seconds that so many batches take after the warm-up."""
    for _ in range(WARM_UP):
        next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return {"seconds": time.perf_counter() - started}


def finetune_theirs(
    data: str, vocab: str, folder: str, steps: int, batch: int, blocks: int, device: str, best: bool
) -> dict[str, Any]:
    """BERT, 768 wide, by the Trainer on its guide's way to classify texts; at its best in the faster number format,
    by length, with fused AdamW."""
    import torch
    import transformers
    from datasets import load_dataset

    from bertling.runtime import choose_dtype

    tokenizer = stock_tokenizer(vocab)
    table = load_dataset("parquet", data_files=data, split="train", cache_dir=folder)
    table = table.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    shape = {"hidden_size": 768, "num_hidden_layers": blocks, "num_attention_heads": 12, "intermediate_size": 3072}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=len(tokenizer), num_labels=max(table["label"]) + 1, **shape)
    )
    times: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    bf16 = choose_dtype("auto", torch.device(device)) == torch.bfloat16
    more = {"bf16": bf16, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"} if best else {}
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        max_steps=WARM_UP + steps,
        report_to=[],
        save_strategy="no",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        **more,
    )
    transformers.Trainer(
        model=model, args=arguments, train_dataset=table, processing_class=tokenizer, callbacks=[Clock()]
    ).train()
    return {"seconds": times[-1] - times[WARM_UP - 1]}


def finetune_ours(
    data: str, vocab: str, folder: str, steps: int, batch: int, blocks: int, device: str, dtype: str
) -> dict[str, Any]:
    """The same model as `bertling finetune` trains it, with an eye on the clock."""
    from bertling.finetune import finetune
    from bertling.runs import resolve_start
    from bertling.train import Trainer

    times: list[float] = []
    step = Trainer.train_step

    def watched(self: Trainer, progress: float) -> Any:
        loss = step(self, progress)
        times.append(time.perf_counter())
        return loss

    Trainer.train_step = watched  # type: ignore[method-assign]
    flags = {
        "preset": "bert", "size": "base", "n_layers": blocks, "vocab": Path(vocab), "train_input": Path(data),
        "val_input": Path(f"{data}.dev.parquet"), "base_dir": Path(folder), "max_iters": WARM_UP + steps,
        "batch_size": batch, "val_interval": 10**6, "device": device, "dtype": dtype,
    }  # fmt: skip
    start = resolve_start("finetune", [], flags, cp=None, resume=False)
    finetune(start, lambda line: None, from_scratch=True)
    return {"seconds": times[-1] - times[WARM_UP - 1]}


PROGRAMS = {one.__name__: one for one in (prepare, batches_theirs, batches_ours, finetune_theirs, finetune_ours)}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](**json.loads(sys.argv[2]))))
