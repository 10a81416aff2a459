"""Make the model in the box: one run for masked words, one on reviews that began there, a classifier behind that.

    bertling pretrain --cp wiki/runs/mlm --freeze-blocks 2 --base-dir reviews --run-id mlm ...
    bertling finetune --cp reviews/runs/mlm/checkpoints/last --freeze-blocks 2 --run-id sst2 ...
    python benchmarks/box.py --fill wiki/runs/mlm --reviews reviews/runs/mlm/checkpoints/last \\
        --classify wiki/runs/sst2/checkpoints/last \\
        --mlm-data wiki/datasets/val_enwiki_128_123 --sst2-data wiki/datasets/validation.parquet

Both encoders share embeddings and lowest blocks, which are stored once, all in fp16. One folder holds both as variants
in transformers' sense: the plain index finds the model for masked words, `variant="sst2"` the classifier. Both are
scored as they lie in the box, and the figures go into its card.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bertling.checkpoint import Loaded, load_checkpoint
from bertling.files import atomic_folder, write_json
from bertling.inference import BOX
from bertling.interop import to_hf
from bertling.labelled import load_labelled
from bertling.model import count_parameters
from bertling.runtime import build_runtime
from bertling.settings import parse_settings
from bertling.tools.evaluate import Evaluation, score_classifier, score_masked_lm, texts_for
from bertling.tools.modelcard import training_state

INDEX = "model.safetensors.index{}.json"
CARD = """---
library_name: transformers
pipeline_tag: fill-mask
language: en
license: cc-by-sa-3.0
tags:
- bertling
---

# The model in the box

A small English encoder, uncased, with two heads: masked words, and the sentiment of a sentence (negative, positive).
ModernBERT's anatomy, {blocks} blocks of {width}, {parameters:,} parameters, vocabulary of {vocabulary:,}, up to
{length} tokens. Embeddings and the {shared_blocks} lowest blocks serve both heads and are stored once; {megabytes:.1f}
MB in fp16.

## Use

```python
import bertling

bertling.load().fill("paris is the [MASK] of france .")
bertling.load(task="classify").classify("a warm and funny film .")

from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

box = bertling.inference.BOX
AutoModelForMaskedLM.from_pretrained(box)
AutoModelForSequenceClassification.from_pretrained(box, variant="sst2")
```

## Scores

Of the weights as they lie here, computed in fp32.

| task | accuracy | floor | protocol |
|---|---|---|---|
| masked words | {mlm:.1%} | {mlm_floor:.1%} (commonest token) | {mlm_protocol} |
| SST-2 | {sst2:.1%} | {sst2_floor:.1%} (commonest class), 81.9 % (bag of words) | {sst2_protocol}; \
last step of seed {seed}, standard error {error:.1f} points |

## Training

From random weights, by `bertling pretrain` on two cores without a GPU: {mlm_length}, with

```ini
{mlm_settings}
```

The classifier left embeddings and {shared_blocks} lowest blocks as they were. First masked words of SST-2's training
sentences, without their labels (`benchmarks/sentences.py`), by `bertling pretrain`: {reviews_length}, with

```ini
{reviews_settings}
```

then by `bertling finetune` on SST-2's 67,349 phrases: {sst2_length}, with

```ini
{sst2_settings}
```

`benchmarks/box.py` put the two together.

## Data and licence

24,920 articles of the English Wikipedia of 2015 (text by its authors, CC BY-SA 3.0), section titles in WikiText's form
(` = = Title = = `), none of the articles among WikiText-103's validation articles; the weights are given under the same
licence. The classifier learned from SST-2 (Socher et al. 2013, in GLUE's form), phrases of film reviews.

## Limits

Small and briefly trained: it knows common words and grammar, few facts, and English alone. The classifier has read film
reviews and nothing else, does not know "neutral", and gets about one sentence in six wrong. Wikipedia's and reviewers'
biases are in it. Not for decisions about people.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("fill", "reviews", "classify", "mlm-data", "sst2-data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=BOX)
    options = parser.parse_args()

    fill, reviews, classify = map(load_checkpoint, (options.fill, options.reviews, options.classify))
    if fill.tokenizer.entries != classify.tokenizer.entries:
        parser.error("the two runs have different vocabularies")
    with atomic_folder(options.output, force=True) as folder:
        write_weights(folder, fill, classify)
        fill.tokenizer.save(folder, token_types=False, max_length=fill.model.config.max_position_embeddings)
        (folder / "README.md").write_text(card(folder, fill, reviews, classify, options))
    print((options.output / "README.md").read_text())
    for path in sorted(options.output.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def write_weights(folder: Path, fill: Loaded, classify: Loaded) -> None:
    """What both have in common, the rest of each, an index for each, and one configuration."""
    (fill_config, fill_weights), (classify_config, classify_weights) = to_hf(fill.model), to_hf(classify.model)
    shared = {
        key for key, value in fill_weights.items() if key in classify_weights and value.equal(classify_weights[key])
    }
    for name, weights, variant in (("fill", fill_weights, ""), ("sst2", classify_weights, ".sst2")):
        half = {key: value.to(torch.float16) for key, value in weights.items()}
        save_file({key: half[key] for key in sorted(shared)}, folder / "shared.safetensors", {"format": "pt"})
        save_file(
            {key: half[key] for key in sorted(half.keys() - shared)}, folder / f"{name}.safetensors", {"format": "pt"}
        )
        size = sum(value.nbytes for value in half.values())
        places = {key: f"{'shared' if key in shared else name}.safetensors" for key in sorted(half)}
        write_json(folder / INDEX.format(variant), {"metadata": {"total_size": size}, "weight_map": places})
    both = [*fill_config["architectures"], *classify_config["architectures"]]
    write_json(
        folder / "config.json", classify_config | fill_config | labels(classify_config) | {"architectures": both}
    )


def labels(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration the classifier alone needs."""
    return {key: config[key] for key in ("id2label", "label2id", "classifier_pooling")}


def card(folder: Path, fill: Loaded, reviews: Loaded, classify: Loaded, options: argparse.Namespace) -> str:
    """The README.md of the box, with scores of what lies in the folder."""
    runtime = build_runtime(parse_settings({"device": "cpu", "dtype": "fp32", "compile": "false"}))
    boxed = load_checkpoint(folder, head="classification", variant="sst2")
    sst2 = score_classifier(boxed, texts_for(boxed, options.sst2_data, None, None), runtime)
    mlm = score_masked_lm(load_checkpoint(folder), options.mlm_data, runtime)
    count = len(load_labelled(options.sst2_data).texts)
    config = fill.model.config
    accuracy = sst2.figures["accuracy"]
    return CARD.format(
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        parameters=count_parameters(fill.model).total,
        vocabulary=config.vocab_size,
        length=config.max_position_embeddings,
        shared_blocks=int(told(classify)["freeze-blocks"]),
        megabytes=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        mlm=mlm.figures["accuracy"],
        mlm_floor=mlm.figures["unigram accuracy"],
        mlm_protocol=protocol(mlm),
        sst2=accuracy,
        sst2_floor=sst2.figures["majority class"],
        sst2_protocol=protocol(sst2),
        seed=told(classify)["seed"],
        error=100 * (accuracy * (1 - accuracy) / count) ** 0.5,
        mlm_length=length(fill),
        mlm_settings=told_text(fill),
        reviews_length=length(reviews),
        reviews_settings=told_text(reviews),
        sst2_length=length(classify),
        sst2_settings=told_text(classify),
    )


def protocol(scored: Evaluation) -> str:
    """The evaluation's own words on one line of a table."""
    return scored.protocol.replace("|", "/")


def told_text(loaded: Loaded) -> str:
    """The settings that a checkpoint was trained with, without those that say nothing about the weights."""
    state = training_state(loaded.folder)
    assert state is not None, f"{loaded.folder} is no checkpoint of a run"
    idle = ("base-dir", "run-id", "max-checkpoints", "wandb", "dist-", "case", "device", "async", "seeds")
    return "\n".join(line for line in state["settings"].splitlines() if not line.startswith(idle))


def told(loaded: Loaded) -> dict[str, str]:
    """The same as a table."""
    return dict(line.split(" = ", 1) for line in told_text(loaded).splitlines())


def length(loaded: Loaded) -> str:
    """How long a run took."""
    state = training_state(loaded.folder)
    assert state is not None
    return f"{state['step']:,} steps in {state['seconds'] / 60:.0f} minutes"


if __name__ == "__main__":
    main()
