"""Looking into prepared data: rows with their masks, and the audit."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import bertling
from static_files import write_msgpack

from bertling.files import BertlingError
from bertling.packed import IGNORED
from bertling.samples import SamplesWriter
from bertling.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertling.tools.inspect import inspect

TOKENIZER = Tokenizer([*SPECIAL_TOKENS, "##s", *(f"w{i}" for i in range(200))])
SEQ_LEN = 66


def toy_rows(count: int) -> np.ndarray:
    rows = np.random.default_rng(0).integers(5, TOKENIZER.vocab_size, (count, SEQ_LEN))
    rows[:, 0], rows[:, -1] = TOKENIZER.cls_id, TOKENIZER.sep_id
    rows[0, 30:] = [TOKENIZER.sep_id] + [TOKENIZER.pad_id] * (SEQ_LEN - 31)
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = SamplesWriter(tmp_path, seq_len=SEQ_LEN, vocab_size=TOKENIZER.vocab_size, pad_id=TOKENIZER.pad_id)
    writer.append(toy_rows(700))
    writer.finish(vocab_fingerprint=TOKENIZER.fingerprint)
    TOKENIZER.save(tmp_path)
    return tmp_path


def test_audit_of_drawn_masks(folder: Path) -> None:
    report = inspect(folder, rows=2, batches=10)
    audit = report.audit
    assert (report.rows, report.seq_len, report.static) == (700, SEQ_LEN, False)
    assert (audit.batches, audit.rows) == (10, 640)
    assert audit.scored == audit.masked + audit.random + audit.kept
    assert audit.scored / audit.ordinary == pytest.approx(10 / 64, abs=0.001)
    assert audit.masked / audit.scored == pytest.approx(0.8, abs=0.03)
    assert audit.random / audit.scored == pytest.approx(0.1, abs=0.02)
    assert (audit.special_masked, audit.special_drawn, audit.changed_elsewhere) == (0, 0, 0)
    assert audit.overlap_expected == pytest.approx(10 / 64, abs=0.001)
    assert audit.overlap == pytest.approx(audit.overlap_expected, abs=0.03)
    assert json.loads(json.dumps(report.to_dict()))["audit"]["scored"] == audit.scored


def test_rows_are_shown_with_their_masks(folder: Path) -> None:
    report = inspect(folder, rows=3, batches=1)
    assert len({row.index for row in report.shown}) == 3
    rows = toy_rows(700)
    for row in report.shown:
        assert row.original == TOKENIZER.decode(rows[row.index].tolist())
        assert row.text.count("{") in (9, 10)
        assert "{[MASK]|" in row.text
    text = report.text()
    assert report.shown[0].text in text
    assert "0 masked, 0 drawn (both must be 0)" in text
    assert "independent draws" in text
    everything = inspect(folder, rows=5000, batches=1).shown
    assert sorted(row.index for row in everything) == list(range(700))
    assert "[PAD]" not in next(row.original for row in everything if row.index == 0)


def test_audit_of_stored_masks_finds_faults(tmp_path: Path) -> None:
    ids = toy_rows(100)
    labels = np.full_like(ids, IGNORED)
    labels[:, 3:6] = ids[:, 3:6]
    ids[:, 3] = TOKENIZER.mask_id
    ids[7, 4] = TOKENIZER.pad_id  # a special token drawn
    labels[9, SEQ_LEN - 1] = TOKENIZER.sep_id  # a special token masked
    ids[9, SEQ_LEN - 1] = TOKENIZER.mask_id
    write_msgpack(tmp_path / "x.msgpack.gz", [(ids, labels)], 100)
    (tmp_path / "vocab").mkdir()
    TOKENIZER.save(tmp_path / "vocab")
    with pytest.raises(BertlingError, match="does not hold its vocabulary; name it with --vocab"):
        inspect(tmp_path / "x.msgpack.gz")
    report = inspect(tmp_path / "x.msgpack.gz", vocabulary=tmp_path / "vocab" / "vocab.txt", batches=50)
    audit = report.audit
    assert (report.static, audit.batches, audit.rows) == (True, 1, 64)
    whole = [inspect(tmp_path / "x.msgpack.gz", vocabulary=tmp_path / "vocab", seed=seed).audit for seed in range(8)]
    assert {one.special_drawn for one in whole} == {0, 1}
    assert {one.special_masked for one in whole} == {0, 1}
    assert all(one.kept >= 64 and one.masked >= 64 and one.overlap == 1.0 for one in whole)
    assert "fixed masks" in report.text()


def test_a_mask_rate_for_masks_that_are_stored_is_said_to_mean_nothing(folder: Path) -> None:
    ids = toy_rows(8)
    labels = np.full_like(ids, IGNORED)
    labels[:, 3], ids[:, 3] = ids[:, 3], TOKENIZER.mask_id
    write_msgpack(folder / "x.msgpack.gz", [(ids, labels)], 8)
    words = ["inspect", folder / "x.msgpack.gz", "-v", folder]
    assert "note:" not in bertling(*words).err
    assert "note: mlm-probability says nothing here" in bertling(*words, "--mlm-probability", 0.3).err
