"""A tiny work folder, and short ways to train in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from bertling.finetune import FinetuneResult, finetune
from bertling.prepare import prepare
from bertling.pretrain import pretrain
from bertling.runs import Outcome, resolve_start
from bertling.tokenizer import Tokenizer

# `pytest --hypothesis-profile thorough` tries more examples, and other ones each time.
hypothesis.settings.register_profile(
    "default",
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("default")
hypothesis.settings.register_profile("thorough", max_examples=5000, derandomize=False)

ASSETS = Path(__file__).parent / "assets"
SEQ_LEN = 32
TINY: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 2,
    "heads": 2,
    "batch_size": 8,
    "device": "cpu",
    "dtype": "fp32",
    "threads": 1,
    "val_interval": 1000,
}
GOOD = "bright warm lovely clean sweet gentle".split()
BAD = "dark cold awful dirty bitter harsh".split()


def labelled_rows(count: int, seed: int) -> list[str]:
    """Lines of a .tsv file whose texts, of 2 to 12 words, tell their class by one or more of the words."""
    generator = np.random.default_rng(seed)
    plain = "the old river and village lamp keeper of stone bread in a".split()
    lines = []
    for number in range(count):
        label = number % 2
        words = generator.choice(plain, generator.integers(1, 11)).tolist()
        words.insert(int(generator.integers(len(words) + 1)), str(generator.choice(GOOD if label else BAD)))
        lines.append(f"{' '.join(words)}\t{label}\n")
    return lines


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(ASSETS / "vocab")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A work folder without runs: vocabulary, prepared text, labelled texts."""
    base = tmp_path_factory.mktemp("prepared")
    tiny_tokenizer.save(base / "vocab")
    prepare([ASSETS / "tiny.txt"], "tiny", base / "datasets", SEQ_LEN, tiny_tokenizer, workers=1)
    for name, count, seed in (("train", 61, 1), ("dev", 24, 2)):
        (base / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(labelled_rows(count, seed)))
    return base


@pytest.fixture
def work(tmp_path: Path, prepared: Path) -> Path:
    """A work folder of one's own, over the shared data."""
    base = tmp_path / "work"
    base.mkdir()
    for path in prepared.iterdir():
        (base / path.name).symlink_to(path)
    return base


@pytest.fixture
def train_mlm(work: Path) -> Callable[..., Outcome]:
    """`train_mlm(cp=..., resume=..., say=..., **settings)` in the work folder; a resumed run is told no sizes."""

    def run(
        cp: Path | None = None, resume: bool = False, say: Callable[[str], None] = lambda text: None, **flags: Any
    ) -> Outcome:
        known = {} if cp is not None or resume else TINY
        start = resolve_start("pretrain", [], {"base_dir": work, **known, **flags}, cp=cp, resume=resume)
        return pretrain(start, say)

    return run


@pytest.fixture
def train_classifier(work: Path) -> Callable[..., FinetuneResult]:
    """`train_classifier(cp=..., from_scratch=..., **settings)` on the work folder's labelled texts."""
    usual = {name: TINY[name] for name in ("device", "dtype", "threads", "val_interval")}
    texts = {"train_input": work / "train.tsv", "val_input": work / "dev.tsv"}

    def run(cp: Path | None = None, from_scratch: bool = False, **flags: Any) -> FinetuneResult:
        known = TINY if from_scratch else usual
        start = resolve_start("finetune", [], {"base_dir": work, **known, **texts, **flags}, cp=cp, resume=False)
        return finetune(start, lambda text: None, from_scratch=from_scratch)

    return run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums are cut up by the number of threads, so that only an equal number gives equal bits."""
    torch.set_num_threads(1)
