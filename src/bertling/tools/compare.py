"""Whether one model is better than another or only luckier: both on the same items, with a paired bootstrap."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bertling.batches import evaluation_batches
from bertling.checkpoint import Loaded
from bertling.files import BertlingError
from bertling.labelled import labels_of
from bertling.model import BertForMaskedLM
from bertling.runtime import Runtime, build_runtime
from bertling.samples import Samples
from bertling.settings import parse_settings
from bertling.tasks import EVAL_MASKS, check_scored, class_logits, classifier_batches, evaluation_rows
from bertling.tools.evaluate import load_for, samples_for, texts_for, trained_seq_len

Counts = npt.NDArray[np.int64]

RESAMPLES, AT_ONCE = 10_000, 500
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items."""

    a: str
    b: str
    items: str
    """What is drawn anew in each resample: texts, or rows with all their masked tokens."""
    n: int
    accuracy_a: float
    accuracy_b: float
    low: float
    high: float
    """The 95 % interval of accuracy_b - accuracy_a."""
    p: float
    """Two-sided: how often chance alone would put the difference on the other side of zero, twice."""
    only_a: int
    only_b: int
    """Texts or masked tokens that only this one gets right."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "difference": self.accuracy_b - self.accuracy_a}

    def text(self) -> str:
        """For people."""
        verdict = "b is better" if self.low > 0 else "a is better" if self.high < 0 else "either may be the better one"
        return "\n".join(
            [
                f"a  {self.accuracy_a:.2%}  {self.a}  (right where b is wrong: {self.only_a:,})",
                f"b  {self.accuracy_b:.2%}  {self.b}  (right where a is wrong: {self.only_b:,})",
                f"b - a: {100 * (self.accuracy_b - self.accuracy_a):+.2f} points, 95 % interval {100 * self.low:+.2f} "
                f"to {100 * self.high:+.2f}, p = {self.p:.4f}: {verdict}",
                f"paired bootstrap, {RESAMPLES:,} resamples of {self.n:,} {self.items}; it holds for these two models "
                "and says nothing of other seeds",
            ]
        )


def compare(
    a: Path,
    b: Path,
    data: Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Comparison:
    """Two masked language models of one vocabulary on a prepared data set, or two classifiers on labelled texts."""
    runtime = build_runtime(parse_settings({"device": device, "compile": "false"}))
    rights, scored, items = [], np.zeros(0, dtype=np.int64), "texts"
    vocabularies: set[str] = set()
    for cp in (a, b):
        loaded = load_for(cp, data, text_column, label_column)
        loaded.model.to(runtime.device)
        vocabularies.add(loaded.tokenizer.fingerprint)
        if isinstance(loaded.model, BertForMaskedLM):
            samples = samples_for(loaded, data)
            right, scored = right_tokens(loaded, samples, runtime)
            items = "rows with all their masked tokens"
        else:
            texts = texts_for(loaded, data, text_column, label_column)
            batches = classifier_batches(texts, loaded.tokenizer, trained_seq_len(loaded))
            right = class_logits(loaded.model, batches, runtime).argmax(-1).numpy() == labels_of(texts)
            right, scored = right[:, None], np.ones(len(right), dtype=np.int64)
        rights.append(right)
    if items != "texts" and len(vocabularies) > 1:
        raise BertlingError(f"{a} and {b}: their vocabularies differ, so their masked words do; compare models of one")
    right_a, right_b = rights
    low, high, p = paired_bootstrap(right_a.sum(1), right_b.sum(1), scored, np.random.default_rng(seed))
    return Comparison(
        a=str(a),
        b=str(b),
        items=items,
        n=len(scored),
        accuracy_a=float(right_a.sum() / scored.sum()),
        accuracy_b=float(right_b.sum() / scored.sum()),
        low=low,
        high=high,
        p=p,
        only_a=int((right_a & ~right_b).sum()),
        only_b=int((right_b & ~right_a).sum()),
    )


def right_tokens(loaded: Loaded, samples: Samples, runtime: Runtime) -> tuple[npt.NDArray[np.bool_], Counts]:
    """For every row which of its slots were answered rightly [N, S], and how many were asked [N]; frozen masks."""
    loaded.model.eval()
    right, asked = [], []
    rows = evaluation_rows(samples.seq_len)
    for batch in evaluation_batches(samples, loaded.tokenizer, batch_size=rows, **EVAL_MASKS._asdict()):
        on_device = batch.to(runtime.device)
        with torch.inference_mode(), runtime.autocast():
            logits = loaded.model(on_device.input_ids, on_device.attention_mask, wanted=on_device.wanted)
        found = logits.argmax(-1).cpu() == batch.labels
        right.append(found.view(len(batch.input_ids), -1))
        asked.append((batch.labels != -100).view(len(batch.input_ids), -1).sum(1))
    check_scored(samples, int(torch.cat(asked).sum()))
    return torch.cat(right)[: samples.rows].numpy(), torch.cat(asked)[: samples.rows].numpy()


def paired_bootstrap(
    right_a: Counts, right_b: Counts, scored: Counts, chance: np.random.Generator
) -> tuple[float, float, float]:
    """The 95 % interval of b's accuracy less a's over resamples of the items, and a two-sided p (Koehn 2004).

    Percentiles (Efron & Tibshirani 1993, chapter 13). Each item brings how many answers were right and how many scored.
    """
    n, gained = len(scored), (right_b - right_a).astype(np.float64)
    differences = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = chance.multinomial(n, np.full(n, 1 / n), AT_ONCE)  # how often each item came: [AT_ONCE, n]
        differences.append((drawn @ gained) / np.maximum(drawn @ scored, 1))
    all_of = np.concatenate(differences)
    low, high = np.quantile(all_of, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), float(min(1.0, 2 * min((all_of <= 0).mean(), (all_of >= 0).mean())))
