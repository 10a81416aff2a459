"""The model that comes with the package: it answers offline, is as good as its card says, and loads in transformers."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from commands import bertling

import bertling as package
from bertling.inference import BOX
from bertling.labelled import load_labelled

DEV = Path(__file__).parents[2] / "shared" / "data" / "sst2" / "validation-00000-of-00001.parquet"
TEXTS = ["paris is the [MASK] of france .", "he was born in [MASK] , england .", "a [MASK]"]


def test_it_fills_without_a_name(tmp_path: Path) -> None:
    done = bertling("fill", "he was born [MASK] london .", "--json", cwd=tmp_path)
    assert done.answer["masks"][0][0][0] == "in"
    assert "model: the one that comes with bertling" in done.err


def test_it_classifies_without_a_name(tmp_path: Path) -> None:
    for text, label in (("a warm , funny and clever film .", "positive"), ("dull , tired and boring .", "negative")):
        assert bertling("classify", text, "--json", cwd=tmp_path).answer["label"] == label


def test_answering_loads_no_compiler() -> None:
    """It takes about as long as importing torch itself (docs/experiments.md, "What a start consists of")."""
    code = (
        "import sys, bertling; bertling.load().fill('a [MASK] .'); print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_it_embeds_and_is_small() -> None:
    assert package.load().embed("a text").shape == (1, 256)
    assert sum(path.stat().st_size for path in BOX.iterdir()) < 15_000_000


def test_fine_tuning_may_begin_with_it(tmp_path: Path) -> None:
    rows = "".join(f"{word} film\t{label}\n" for word, label in (("good", 1), ("bad", 0)) for _ in range(4))
    (tmp_path / "texts.tsv").write_text("sentence\tlabel\n" + rows)
    words = ["--cp", BOX, "--train-input", "texts.tsv", "--val-input", "texts.tsv", "--max-iters", 1, "--batch-size", 4]
    assert bertling("finetune", *words, "--json", cwd=tmp_path).answer["seeds"][0]["step"] == 1


@pytest.mark.skipif(not DEV.exists(), reason="SST-2 is not at hand")
def test_it_is_as_good_as_its_card_says() -> None:
    data = load_labelled(DEV)
    assert data.labels is not None
    labels = [answer["label"] for answer in package.load(task="classify").classify(data.texts)]
    right = np.mean([label == ("negative", "positive")[i] for label, i in zip(labels, data.labels, strict=True)])
    said = re.search(r"\| SST-2 \| ([\d.]+)%", (BOX / "README.md").read_text())
    assert said is not None
    assert float(said[1]) >= 82
    assert right == pytest.approx(float(said[1]) / 100, abs=0.002)


def test_stock_classes_load_both() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BOX)
    fill = transformers.AutoModelForMaskedLM.from_pretrained(BOX, dtype=torch.float32).eval()
    classify = transformers.AutoModelForSequenceClassification.from_pretrained(
        BOX, variant="sst2", dtype=torch.float32
    ).eval()
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            scores = fill(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1)
            classes = classify(**batch).logits.softmax(-1)[0]
        best = package.load().fill(text)[0]["masks"][0][0]
        assert tokenizer.convert_ids_to_tokens(int(scores.argmax())) == best[0]
        assert float(scores.max()) == pytest.approx(best[1], abs=1e-4)
        ours = package.load(task="classify").classify(text)[0]["probabilities"]
        assert ours == pytest.approx({classify.config.id2label[i]: float(p) for i, p in enumerate(classes)}, abs=1e-4)
