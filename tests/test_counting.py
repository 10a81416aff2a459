"""benchmarks/counting.py: its tables are distributions, and in a text that neighbours determine it is right."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from bertling.prepare import prepare
from bertling.tokenizer import Tokenizer

COUNTING = Path(__file__).parent.parent / "benchmarks" / "counting.py"


def test_each_row_of_a_table_is_a_distribution() -> None:
    counts = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0], [9.0, 0.0, 2.0]])
    unigram = torch.tensor([0.5, 0.2, 0.3])
    ratios = runpy.run_path(str(COUNTING))["log_ratios"](counts, unigram).float()
    torch.testing.assert_close((ratios.exp() * unigram).sum(dim=1), torch.ones(3), atol=2e-3, rtol=0)
    assert ratios[1].abs().max() < 1e-3  # a neighbour never seen says nothing
    assert ratios[0, 1] > 0 > ratios[0, 0]


def test_a_cycle_of_words_is_found(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "cycle.txt"
    cycle = "old river and village lamp keeper of stone bread in a the"
    text.write_text("".join(f" = Title {number} = \n\n{f'{cycle} ' * 20}\n" for number in range(60)))
    prepare([text], "cycle", tmp_path / "datasets", 32, tiny_tokenizer, workers=1)
    train, val = (next((tmp_path / "datasets").glob(f"{split}_*")) for split in ("train", "val"))
    monkeypatch.setattr(sys, "argv", [str(COUNTING), "--train", str(train), "--val", str(val)])
    capsys.readouterr()
    runpy.run_path(str(COUNTING), run_name="__main__")
    said = capsys.readouterr().out
    found = re.match(r"accuracy ([\d.]+)%, loss [\d.]+, [\d,]+ places\n", said)
    assert found is not None, said
    assert float(found[1]) > 80  # always the commonest token: at most one in twelve
