"""Comparisons of two models: the bootstrap against theory, and the whole way through the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import TEXT, VOCAB, bertling

from bertling.checkpoint import load_checkpoint, write_model
from bertling.finetune import FinetuneResult
from bertling.runs import Outcome
from bertling.tokenizer import Tokenizer
from bertling.tools.compare import Comparison, compare, paired_bootstrap
from bertling.tools.evaluate import evaluate


def test_the_interval_is_that_of_theory() -> None:
    chance = np.random.default_rng(1)
    a, b = chance.random((2, 2000)) < np.array([[0.7], [0.74]])
    right_a, right_b = a.astype(np.int64), b.astype(np.int64)
    low, high, p = paired_bootstrap(right_a, right_b, np.ones(2000, dtype=np.int64), chance)
    difference = right_b - right_a
    half = 1.96 * difference.std() / 2000**0.5
    assert low == pytest.approx(difference.mean() - half, abs=0.002)
    assert high == pytest.approx(difference.mean() + half, abs=0.002)
    assert 0 <= p < 0.05


def test_equal_models_are_not_told_apart() -> None:
    right = np.array([3, 0, 2, 5])
    assert paired_bootstrap(right, right, np.full(4, 5), np.random.default_rng(0)) == (0.0, 0.0, 1.0)


def test_rows_count_with_all_their_tokens() -> None:
    # One row of 9 tokens, all gained, one of 1, lost: 0.8 of the tokens, though only half of the rows.
    low, high, _ = paired_bootstrap(
        np.array([0, 1] * 50), np.array([9, 0] * 50), np.array([9, 1] * 50), np.random.default_rng(0)
    )
    assert low < 0.8 < high
    assert low > 0.6


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.03, "b is better"), (-0.03, -0.01, "a is better"), (-0.01, 0.03, "either may be the better one")],
)
def test_the_verdict_is_that_of_the_interval(low: float, high: float, verdict: str) -> None:
    told = Comparison("x", "y", "texts", 10, 0.5, 0.5 + (low + high) / 2, low, high, 0.5, 1, 2).text()
    assert told.splitlines()[2].endswith(verdict)
    assert f"interval {100 * low:+.2f} to {100 * high:+.2f}" in told


def test_two_masked_language_models(train_mlm: Callable[..., Outcome], work: Path) -> None:
    begun = train_mlm(max_iters=1, run_id="begun").run
    trained = train_mlm(max_iters=100, run_id="trained", learning_rate=1e-2).run
    data = next((work / "datasets").glob("train_*"))
    result = compare(begun, trained, data, device="cpu")
    assert result.accuracy_a == pytest.approx(evaluate(begun, data, device="cpu").figures["accuracy"])
    assert result.accuracy_b == pytest.approx(evaluate(trained, data, device="cpu").figures["accuracy"])
    assert result.low <= result.accuracy_b - result.accuracy_a <= result.high
    assert result.accuracy_b > result.accuracy_a
    assert result.only_b - result.only_a == pytest.approx(
        (result.accuracy_b - result.accuracy_a) * evaluate(begun, data, device="cpu").figures["scored"]
    )
    assert compare(begun, begun, data, device="cpu").p == 1.0


def test_two_classifiers_by_command(train_classifier: Callable[..., FinetuneResult], work: Path) -> None:
    runs = [
        train_classifier(from_scratch=True, epochs=epochs, learning_rate=5e-3, run_id=f"r{epochs}").seeds[0].outcome.run
        for epochs in (0.2, 6)
    ]
    ended = bertling("compare", *map(str, runs), "--data", str(work / "dev.tsv"), "--device", "cpu", "--json")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert told["n"] == 24
    assert told["accuracy_b"] == pytest.approx(evaluate(runs[1], work / "dev.tsv", device="cpu").figures["accuracy"])
    assert told["difference"] * 24 == pytest.approx(told["only_b"] - told["only_a"])


def test_unlike_models_are_refused(
    train_mlm: Callable[..., Outcome], train_classifier: Callable[..., FinetuneResult], work: Path
) -> None:
    masked = train_mlm(max_iters=1, run_id="m").run
    one = load_checkpoint(masked / "checkpoints" / "last")
    *others, last_but_one, last = one.tokenizer.entries
    (work / "other").mkdir()
    write_model(work / "other", one.model, Tokenizer([*others, last, last_but_one]))
    # A file of fixed masks does not say which vocabulary it is of.
    words = ["-i", TEXT, "-l", "fixed", "-o", work / "fixed", "-m", 16, "-v", VOCAB, "--format", "msgpack"]
    assert bertling("prepare", *words).status == 0
    data = work / "fixed" / "val_fixed_16_123.msgpack.gz"
    refusal = bertling("compare", masked, work / "other", "--data", data, "--device", "cpu").error
    assert "their vocabularies differ" in refusal
    classifier = train_classifier(from_scratch=True, max_iters=1, run_id="c").seeds[0].outcome.run
    ended = bertling("compare", str(masked), str(classifier), "--data", str(work / "dev.tsv"), "--device", "cpu")
    assert ended.status == 2
    assert "masked language model" in ended.err
    assert ended.err.count("\n") == 1
