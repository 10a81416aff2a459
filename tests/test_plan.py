"""What is foretold of a run, against the run itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import bertling

from bertling.runs import Outcome
from bertling.settings import Settings
from bertling.tools.plan import foretell, warnings

TINY = "--d-model 32 --n-layers 2 --heads 2 --batch-size 8 --device cpu --dtype fp32 --threads 1".split()


def test_a_run_by_steps_and_one_by_the_clock() -> None:
    # 100 steps of 1 s, 11 evaluations of 2 s, 5 s to get ready.
    assert foretell(Settings(max_iters=100), 50.0, 1.0, 2.0, 5.0) == (100, 127.0)
    # One evaluation at the start, and one every 10 steps.
    assert foretell(Settings(max_iters=100, val_interval=10), 50.0, 1.0, 2.0, 5.0) == (100, pytest.approx(127.0))
    assert foretell(Settings(epochs=1.5, val_interval=75), 50.0, 1.0, 2.0, 0.0) == (75, pytest.approx(79.0))
    steps, seconds = foretell(Settings(max_minutes=2.0), 50.0, 1.0, 2.0, 5.0)
    assert (steps, seconds) == (93, 120.0)
    assert foretell(Settings(max_minutes=2.0, max_iters=1000), 50.0, 1.0, 2.0, 5.0) == (93, 120.0)
    # Of what goes on only the rest.
    assert foretell(Settings(max_iters=100), 50.0, 1.0, 2.0, 0.0, done=40, seconds=60.0) == (60, 82.0)
    assert foretell(Settings(max_minutes=3.0), 50.0, 1.0, 2.0, 5.0, done=40, seconds=60.0) == (93, 120.0)


def test_warnings_name_what_does_not_fit() -> None:
    assert warnings(5000, 1.0, 10.0) == []
    few, thin, old = warnings(50, 9.0, 0.1)
    assert "50 steps" in few
    assert "smaller" in thin
    assert "9.0 times" in old


def test_the_plan_holds(work: Path, train_mlm: Callable[..., Outcome]) -> None:
    flags = ["--base-dir", str(work), *TINY, "--max-iters", "40", "--word-vectors", "counts"]
    ended = bertling("plan", *flags, "--json")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert not (work / "runs").exists(), "nothing is kept"
    outcome = train_mlm(max_iters=40, word_vectors="counts")
    assert told["steps"] == outcome.step == 40
    assert told["tokens"] == 40 * 8 * 32
    # The order of magnitude: a run this short is mostly evaluations and checkpoints.
    assert 60 * told["minutes"] < 10 * outcome.seconds
    assert outcome.seconds < 10 * 60 * told["minutes"] + 5
    on_disk = sum(path.stat().st_size for path in (outcome.run / "checkpoints").rglob("*") if not path.is_symlink())
    assert 0.5 * on_disk < told["disk_bytes"] < 3 * on_disk
    assert 1e8 < told["memory_bytes"] < 2e10
    assert any("only 40 steps" in warning for warning in told["warnings"])
    rest = bertling("plan", "--cp", outcome.run, "--max-iters", 50).out
    assert rest.startswith("model ")
    assert " for 10 more steps, " in rest
    assert f"{50 * 8 * 32:,} tokens" in rest
