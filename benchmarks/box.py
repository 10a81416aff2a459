"""Make the model in the box: masked words, then a classifier from that, then masked words on half of that one.

    bertling pretrain -c configs/cpu-1h.ini --run-id mlm
    bertling finetune --cp wiki/runs/mlm --base-dir wiki --run-id sst2 ...
    bertling pretrain -c configs/cpu-1h.ini --run-id again --cp wiki/runs/sst2 --freeze-blocks 2 --dropout 0
    python benchmarks/box.py wiki/runs/mlm wiki/runs/sst2 wiki/runs/again \\
        --mlm-data wiki/datasets/val_wiki_128_123 --sst2-data wiki/datasets/validation-00000-of-00001.parquet

The last model with either head goes in the box, in fp16; what both have in common (embeddings and lowest blocks, where
one of them was trained with these frozen) is stored once. One folder holds both as variants in transformers' sense: the
plain index finds the model for masked words, `variant="sst2"` the classifier. Both are scored as they lie in the box,
and the figures go into its card.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bertling.checkpoint import Loaded, load_checkpoint
from bertling.files import atomic_folder, write_json
from bertling.inference import BOX
from bertling.interop import head_of, to_hf
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

bertling.load().fill("she won the gold [MASK] at the olympic games .")
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
one seed, standard error {error:.1f} points |

## Training

On two cores without a GPU.

{stages}
`benchmarks/box.py` put the last of either head together.

## Data and licence

24,920 articles of the English Wikipedia of 2015 (text by its authors, CC BY-SA 3.0), titles of sections and
sub-sections in WikiText's form (` = = Title = = `, ` = = = Title = = = `), none of the articles among WikiText-103's
validation articles; the weights are given under the same licence. The classifier learned from SST-2 (Socher et al.
2013, in GLUE's form), phrases of film reviews.

## Limits

Small and briefly trained: it knows common words and grammar, few facts, and English alone. The classifier has read film
reviews and nothing else, does not know "neutral", and gets {wrong:.0%} of their sentences wrong. Wikipedia's and
reviewers' biases are in it. Not for decisions about people.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=Path, nargs="+", help="checkpoints, each trained from the one before")
    for name in ("mlm-data", "sst2-data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=BOX)
    options = parser.parse_args()

    stages = [load_checkpoint(folder) for folder in options.stages]
    last = {head_of(stage.model): stage for stage in stages}
    if not {"masked_lm", "classification"} <= last.keys():
        parser.error("the box needs a model for masked words and a classifier")
    fill, classify = last["masked_lm"], last["classification"]
    if fill.tokenizer.entries != classify.tokenizer.entries:
        parser.error("the two models have different vocabularies")
    with atomic_folder(options.output, force=True) as folder:
        shared = write_weights(folder, fill, classify)
        fill.tokenizer.save(folder, token_types=False, max_length=fill.model.config.max_position_embeddings)
        (folder / "README.md").write_text(card(folder, stages, shared, options))
    print((options.output / "README.md").read_text())
    for path in sorted(options.output.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def write_weights(folder: Path, fill: Loaded, classify: Loaded) -> set[str]:
    """What both have in common, whose names it returns, the rest of each, an index for each, and one configuration."""
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
    return shared


def labels(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration the classifier alone needs."""
    return {key: config[key] for key in ("id2label", "label2id", "classifier_pooling")}


def card(folder: Path, stages: list[Loaded], shared: set[str], options: argparse.Namespace) -> str:
    """The README.md of the box, with scores of what lies in the folder."""
    runtime = build_runtime(parse_settings({"device": "cpu", "dtype": "fp32", "compile": "false"}))
    fill, classify = load_checkpoint(folder), load_checkpoint(folder, head="classification", variant="sst2")
    mlm = score_masked_lm(fill, options.mlm_data, runtime)
    sst2 = score_classifier(classify, texts_for(classify, options.sst2_data, None, None), runtime)
    count = len(load_labelled(options.sst2_data).texts)
    config = fill.model.config
    accuracy = sst2.figures["accuracy"]
    return CARD.format(
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        parameters=count_parameters(fill.model).total,
        vocabulary=config.vocab_size,
        length=config.max_position_embeddings,
        shared_blocks=len({name.split(".")[2] for name in shared if name.startswith("model.layers.")}),
        megabytes=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        mlm=mlm.figures["accuracy"],
        mlm_floor=mlm.figures["unigram accuracy"],
        mlm_protocol=protocol(mlm),
        sst2=accuracy,
        sst2_floor=sst2.figures["majority class"],
        sst2_protocol=protocol(sst2),
        wrong=1 - accuracy,
        error=100 * (accuracy * (1 - accuracy) / count) ** 0.5,
        stages="\n".join(told(number, stage) for number, stage in enumerate(stages, 1)),
    )


def protocol(scored: Evaluation) -> str:
    """The evaluation's own words on one line of a table."""
    return scored.protocol.replace("|", "/")


def told(number: int, stage: Loaded) -> str:
    """One stage of the training: which command, how long, from what, and its settings but for those of the machine."""
    state = training_state(stage.folder)
    assert state is not None, f"{stage.folder} is no checkpoint of a run"
    idle = ("base-dir", "run-id", "max-checkpoints", "wandb", "dist-", "case", "device", "async", "seeds")
    lines = [line for line in state["settings"].splitlines() if not line.startswith(idle)]
    frozen = int(dict(line.split(" = ", 1) for line in lines)["freeze-blocks"])
    start = f"from {number - 1}" if number > 1 else "from random weights"
    kept = f", embeddings and {frozen} lowest blocks left as they were" if frozen else ""
    command = "pretrain" if head_of(stage.model) == "masked_lm" else "finetune"
    length = f"{state['step']:,} steps in {state['seconds'] / 60:.0f} minutes"
    settings = "\n".join(lines)
    return f"{number}. `bertling {command}` {start}{kept}: {length}, with\n\n```ini\n{settings}\n```\n"


if __name__ == "__main__":
    main()
