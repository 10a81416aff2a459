"""Batches: a pure function of (seed, step), equal however they are shared out."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from static_files import write_msgpack

from bertling.batches import Batch, MaskedBatches, check_samples, evaluation_batches
from bertling.files import BertlingError
from bertling.packed import IGNORED
from bertling.samples import Samples, SamplesWriter, open_samples
from bertling.tokenizer import Tokenizer

SEQ_LEN = 16
WORDS = [f"w{i}" for i in range(60)]
TOKENIZER = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
OTHER = Tokenizer([*WORDS, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
# Of the batches in the test below; other ones make runs incomparable, and a resumed run another one.
EVALUATION_SHA256 = "4797967023fc91ba3d356ec507667afac19f0d13fb8d2e6588be9537f50f7de6"
TRAINING_SHA256 = "c655250b72306f383efe43af6870d70f3253dad9991ebff32ed3a130f8fec2ae"


def toy_rows(count: int, seq_len: int = SEQ_LEN, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(5, TOKENIZER.vocab_size, (count, seq_len))
    rows[:, 0], rows[:, -1] = TOKENIZER.cls_id, TOKENIZER.sep_id
    return rows


def toy(folder: Path, count: int, *, rows: np.ndarray | None = None, seq_len: int = SEQ_LEN, seed: int = 0) -> Samples:
    folder.mkdir()
    writer = SamplesWriter(folder, seq_len=seq_len, vocab_size=TOKENIZER.vocab_size, pad_id=0, shard_bytes=320)
    writer.append(toy_rows(count, seq_len, seed) if rows is None else rows)
    writer.finish(vocab_fingerprint=TOKENIZER.fingerprint)
    return open_samples(folder)


def static(path: Path, count: int, seed: int = 0) -> Samples:
    ids = toy_rows(count, seed=seed)
    labels = np.where(np.random.default_rng(seed).random(ids.shape) < 0.2, ids, IGNORED)
    labels[:, [0, -1]] = IGNORED
    write_msgpack(path, [(np.where(labels != IGNORED, TOKENIZER.mask_id, ids), labels)], count)
    return open_samples(path)


def batches(samples: Sequence[Samples], batch_size: int = 8, seed: int = 1) -> MaskedBatches:
    return MaskedBatches(samples, batch_size=batch_size, seed=seed, mlm_probability=0.15, tokenizer=TOKENIZER)


def targets(some: Sequence[Batch]) -> list[list[tuple[int, int]]]:
    """(column, label) of the scored places, row by row."""
    found = []
    for batch in some:
        assert batch.wanted is not None
        rows, seq_len = batch.input_ids.shape
        for row in range(rows):
            slots = slice(row * len(batch.labels) // rows, (row + 1) * len(batch.labels) // rows)
            pairs = zip((batch.wanted[slots] - row * seq_len).tolist(), batch.labels[slots].tolist(), strict=True)
            found.append([(place, label) for place, label in pairs if label != IGNORED])
    return found


def same(a: Batch, b: Batch) -> bool:
    assert a.wanted is not None
    assert b.wanted is not None
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.wanted, b.wanted) and torch.equal(a.labels, b.labels)


def test_any_step_equals_the_same_step_in_order(tmp_path: Path) -> None:
    samples = toy(tmp_path / "x", 50)
    in_order = batches([samples])
    steps = [in_order.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        assert same(batches([samples]).batch(step), steps[step])
        assert same(in_order.batch(step), steps[step])
    assert not same(batches([samples], seed=2).batch(3), steps[3])
    far = batches([samples]).batch(10**9)
    assert far.input_ids.shape == (8, SEQ_LEN)


def test_each_epoch_holds_every_row_once_in_its_own_order(tmp_path: Path) -> None:
    samples = toy(tmp_path / "x", 50)
    train = batches([samples])
    assert (train.steps_per_epoch, train.epoch(0), train.epoch(25)) == (6.25, 0.0, 4.0)
    taken = np.concatenate([part for step in range(25) for _, part in train.rows(step)]).reshape(4, 50)
    assert (np.sort(taken, axis=1) == np.arange(50)).all()
    assert len({tuple(order) for order in taken.tolist()}) == 4
    batch = train.batch(6)  # reaches over the end of the first epoch
    restored = batch.input_ids.clone()
    assert batch.wanted is not None
    used = batch.labels != IGNORED
    restored.view(-1)[batch.wanted[used]] = batch.labels[used]
    expected = np.concatenate([s.fetch(part) for s, part in train.rows(6)])
    assert (restored.numpy() == expected).all()


def test_other_epochs_have_other_masks(tmp_path: Path) -> None:
    samples = toy(tmp_path / "x", 8)
    train = batches([samples])
    first, second = targets([train.batch(0)]), targets([train.batch(1)])
    by_row = [
        dict(zip(train.rows(step)[0][1].tolist(), found, strict=True)) for step, found in ((0, first), (1, second))
    ]
    assert any({place for place, _ in by_row[0][row]} != {place for place, _ in by_row[1][row]} for row in range(8))


def test_data_sets_are_taken_in_turn(tmp_path: Path) -> None:
    sets = [toy(tmp_path / str(i), rows, seed=i) for i, rows in enumerate((10, 7, 4))]
    train = batches(sets, batch_size=3)
    stream = [(s.path.name, row) for step in range(14) for s, part in train.rows(step) for row in part.tolist()]
    assert [name for name, _ in stream] == ["0"] * 10 + ["1"] * 7 + ["2"] * 4 + ["0"] * 10 + ["1"] * 7 + ["2"] * 4
    assert sorted(row for _, row in stream[10:17]) == list(range(7))
    assert (train.epoch(7), train.steps_per_epoch) == (3.0, 7 / 3)
    assert train.epoch(4) == pytest.approx(1 + 2 / 7)


def test_fewer_rows_than_one_batch(tmp_path: Path) -> None:
    batch = batches([toy(tmp_path / "x", 3)], batch_size=10).batch(0)
    assert batch.input_ids.shape == (10, SEQ_LEN)
    assert batch.count == 20


@pytest.mark.parametrize("kind", ["drawn", "static"])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 5), (2, 6), (2, 4), (3, 3), (5, 2), (16, 1), (1, 100)])
def test_shares_make_up_the_batch(tmp_path: Path, kind: str, world_size: int, micro: int) -> None:
    samples = toy(tmp_path / "x", 40) if kind == "drawn" else static(tmp_path / "x.msgpack", 40)
    train = batches([samples], batch_size=12)
    whole = train.batch(4)
    shares = [
        train.micro_batches(4, rank=rank, world_size=world_size, micro_batch_size=micro) for rank in range(world_size)
    ]
    parts = [batch for some, _ in shares for batch in some]
    assert len({len(some) for some, _ in shares}) == 1, "every rank takes part in every step"
    assert len({batch.input_ids.shape for batch in parts} | {(parts[0].input_ids.shape)}) == 1
    assert all(len(batch.input_ids) <= micro for batch in parts)
    assert {total for _, total in shares} == {whole.count} == {sum(batch.count for batch in parts)}
    found = [row for batch in parts for row in zip(batch.input_ids.tolist(), targets([batch]), strict=True)]
    real = [row for row in found if row[1]]
    assert real == [row for row in zip(whole.input_ids.tolist(), targets([whole]), strict=True) if row[1]]
    for batch in parts:
        assert batch.wanted is not None
        assert batch.wanted.max() < batch.input_ids.numel()
        assert batch.wanted.min() >= 0
        assert batch.count == int((batch.labels != IGNORED).sum())


def test_no_filler_where_it_divides(tmp_path: Path) -> None:
    train = batches([toy(tmp_path / "x", 40)], batch_size=100)
    some, _ = train.micro_batches(0, rank=1, world_size=2, micro_batch_size=20)
    assert [len(batch.input_ids) for batch in some] == [17, 17, 17], "50 rows in 3 equal parts, one row filled up"
    assert sum(batch.tokens for batch in some) == 50 * SEQ_LEN
    some, _ = train.micro_batches(0, rank=0, world_size=2, micro_batch_size=25)
    assert [batch.count for batch in some] == [50, 50]


@pytest.mark.parametrize("rows", [1, 63, 64, 150])
def test_evaluation_masks_do_not_depend_on_the_batch_size(tmp_path: Path, rows: int) -> None:
    samples = toy(tmp_path / "x", rows)

    def run(batch_size: int, seed: int = 0) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        some = list(evaluation_batches(samples, TOKENIZER, batch_size=batch_size, mlm_probability=0.15, seed=seed))
        assert {batch.input_ids.shape for batch in some} == {(batch_size, SEQ_LEN)}
        assert sum(batch.count for batch in some) == 2 * rows, "filled up rows are not scored"
        ids = [row for batch in some for row in batch.input_ids.tolist()]
        return ids[:rows], targets(some)[:rows]

    reference = run(64)
    for batch_size in (1, 7, 100, 256):
        assert run(batch_size) == reference
    assert run(64, seed=1) != reference
    more = open_samples(
        toy(tmp_path / "y", rows + 100, rows=np.concatenate([samples.fetch(np.arange(rows)), toy_rows(100)])).path
    )
    first = next(iter(evaluation_batches(more, TOKENIZER, batch_size=rows, mlm_probability=0.15)))
    assert (first.input_ids.tolist(), targets([first])) == reference, "nor on the rows behind"


def digest(some: Iterable[Batch]) -> str:
    found = hashlib.sha256()
    for batch in some:
        assert batch.wanted is not None
        for tensor in (batch.input_ids, batch.wanted, batch.labels):
            found.update(tensor.numpy().astype("<i8").tobytes())
    return found.hexdigest()


def test_orders_and_masks_are_those_on_record(tmp_path: Path) -> None:
    samples = toy(tmp_path / "x", 150)
    evaluation = evaluation_batches(samples, TOKENIZER, batch_size=50, mlm_probability=0.15)
    assert digest(evaluation) == EVALUATION_SHA256
    train = batches([samples])
    assert digest(train.batch(step) for step in (0, 18, 40)) == TRAINING_SHA256


def test_evaluation_is_shared_by_ranks(tmp_path: Path) -> None:
    samples = toy(tmp_path / "x", 50)

    def run(rank: int, world_size: int) -> list[Batch]:
        return list(
            evaluation_batches(samples, TOKENIZER, batch_size=8, mlm_probability=0.15, rank=rank, world_size=world_size)
        )

    whole, shares = run(0, 1), [run(rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert all(same(shares[i % 3][i // 3], batch) for i, batch in enumerate(whole))


def test_static_masks_are_used_as_they_are(tmp_path: Path) -> None:
    samples = static(tmp_path / "x.msgpack.gz", 20)
    batch = batches([samples]).batch(2)
    indices = np.concatenate([part for _, part in batches([samples]).rows(2)])
    labels = samples.fetch_labels(indices)
    assert (batch.input_ids.numpy() == samples.fetch(indices)).all()
    places = [[(int(c), int(row[c])) for c in np.flatnonzero(row != IGNORED)] for row in labels]
    assert targets([batch]) == places
    scored = list(evaluation_batches(samples, TOKENIZER, batch_size=6, mlm_probability=0.15))
    assert sum(one.count for one in scored) == int((samples.fetch_labels(np.arange(20)) != IGNORED).sum())
    assert len({len(one.labels) for one in scored}) == 1


def test_attention_mask_only_where_there_is_padding(tmp_path: Path) -> None:
    rows = toy_rows(4)
    rows[2, 5:] = [TOKENIZER.sep_id] + [0] * (SEQ_LEN - 6)
    samples = toy(tmp_path / "x", 4, rows=rows)
    found = list(evaluation_batches(samples, TOKENIZER, batch_size=2, mlm_probability=0.15))
    assert found[0].attention_mask is None
    assert found[1].attention_mask is not None
    assert found[1].attention_mask.tolist() == [[True] * 6 + [False] * (SEQ_LEN - 6), [True] * SEQ_LEN]


def test_a_drawn_padding_token_in_a_foreign_file_is_not_padding(tmp_path: Path) -> None:
    ids = toy_rows(2)
    labels = np.full_like(ids, IGNORED)
    labels[0, 4], ids[0, 4] = ids[0, 4], TOKENIZER.pad_id
    write_msgpack(tmp_path / "x.msgpack", [(ids, labels)], 2)
    batch = next(
        evaluation_batches(open_samples(tmp_path / "x.msgpack"), TOKENIZER, batch_size=2, mlm_probability=0.15)
    )
    assert batch.attention_mask is None or bool(batch.attention_mask.all())


def test_a_row_with_nothing_to_mask(tmp_path: Path) -> None:
    rows = toy_rows(4)
    rows[1, 1:-1] = TOKENIZER.unk_id
    train = batches([toy(tmp_path / "x", 4, rows=rows)], batch_size=4)
    assert train.batch(0).count == 6
    some, total = train.micro_batches(0, rank=0, world_size=1, micro_batch_size=1)
    assert (total, sorted(batch.count for batch in some)) == (6, [0, 2, 2, 2])


def test_to_device(tmp_path: Path) -> None:
    batch = batches([toy(tmp_path / "x", 8)]).batch(0)
    moved = batch.to("meta", non_blocking=True)
    assert (moved.input_ids.device.type, moved.labels.device.type, moved.count) == ("meta", "meta", batch.count)
    assert moved.attention_mask is None


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    drawn, longer = toy(tmp_path / "a", 8), toy(tmp_path / "b", 8, seq_len=20)
    fixed = static(tmp_path / "c.msgpack", 8)
    for samples, tokenizer, message in [
        ([], TOKENIZER, "no data set is given"),
        ([drawn, longer], TOKENIZER, r"b: has rows of 20 ids, .*a of 16"),
        ([drawn, fixed], TOKENIZER, r"c\.msgpack: its masks are fixed, those of .*a are not"),
        ([drawn], OTHER, "a: prepared with another vocabulary"),
        ([fixed], OTHER, r"rows begin with id 2, the vocabulary's \[CLS\] is 62"),
        ([fixed], Tokenizer(TOKENIZER.entries[:20]), "the vocabulary has 20 entries"),
    ]:
        with pytest.raises(BertlingError, match=message):
            check_samples(samples, tokenizer)
    with pytest.raises(BertlingError, match="batch-size: must be at least 1, not 0"):
        batches([drawn], batch_size=0)
    with pytest.raises(BertlingError, match="micro-batch-size: must be at least 1, not 0"):
        batches([drawn]).micro_batches(0, rank=0, world_size=1, micro_batch_size=0)
