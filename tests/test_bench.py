"""What the benchmark counts is what is computed, and its contestants do the same work."""

import json
from typing import Any

import pytest
import torch
from commands import bertling
from torch.utils.flop_counter import FlopCounterMode

from bertling.model import BertForMaskedLM
from bertling.tools.bench import Measured, Report, flops
from bertling.tools.contestants import Workload

TINY = "--batch-size 4 --seq-len 32 --vocab-size 128 --rounds 1 --device cpu --dtype fp32".split()


@pytest.mark.parametrize("preset", ["bert", "modern", "distilbert", "seed"])
def test_flops_are_those_that_torch_counts(preset: str) -> None:
    workload = Workload(preset, 3, 64, 4, 128, 4, 32)
    model = BertForMaskedLM(workload.config())
    ids = torch.randint(5, 128, (4, 32))
    positions, labels = torch.arange(0, 128, 8), torch.randint(5, 128, (16,))
    with FlopCounterMode(display=False) as counter:
        model(ids, None, positions, labels).loss_sum.backward()
    assert counter.get_total_flops() == flops(workload.config(), 4, 32, 16)


def test_ratios_are_taken_round_by_round() -> None:
    def measured(name: str, seconds: list[float]) -> Measured:
        return Measured(name, "", 0.0, 0.0, 0.0, {"step": 0.0}, 0.0, 0, seconds)

    report = Report(
        Workload("bert", 1, 8, 1, 64, 4, 8),
        1e9,
        1e10,
        [measured("ours", [1.0, 2.0, 4.0]), measured("stock", [2.0, 6.0, 8.0])],
    )
    assert report.ratios() == {"stock": (2.0, 2.0, 3.0)}
    assert report.mfu == pytest.approx(1e9 / 2.0 / 1e10)


def test_bench_against_the_stock_class(capfd: Any) -> None:
    pytest.importorskip("transformers")
    ended = bertling("bench", "--preset", "bert", "--against", "hf", *TINY, "--json")
    assert ended.status == 0, ended.err
    answer = json.loads(ended.out)
    assert [one["contestant"] for one in answer["contestants"]] == ["ours", "stock", "stock at its best"]
    ours = answer["contestants"][0]
    assert ours["tokens_per_second"] > 0
    parts = ours["milliseconds"]
    assert sum(parts[name] for name in ("data", "forward", "backward", "optimizer")) == pytest.approx(parts["step"])
    assert all(value > 0 for value in parts.values())
    assert 0 < answer["mfu"] < 1
    assert set(answer["ratios"]) == {"stock", "stock at its best"}


def test_what_cannot_be_compared_is_refused() -> None:
    assert "the preset seed has no stock class" in bertling("bench", "--preset", "seed", "--against", "hf", *TINY).error
    assert "no such preset" in bertling("bench", "--preset", "gpt", *TINY).error
