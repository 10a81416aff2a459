"""Word vectors from counts: the counts by hand, what the vectors know, and how they get into a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertling import cooccurrence
from bertling.attention import rotary_angles, rotate
from bertling.checkpoint import load_checkpoint
from bertling.cooccurrence import SCALE, factorise, neighbour_tables, to_mutual_information, word_vectors
from bertling.model import BertForMaskedLM
from bertling.presets import preset_config
from bertling.pretrain import look_at_neighbours, look_for_the_like
from bertling.runs import Outcome
from bertling.samples import Samples

CLS, SEP = 2, 3
SPECIAL = [0, 1, 2, 3, 4]


def samples_of(rows: list[list[int]]) -> Samples:
    return Samples(Path("toy"), len(rows), len(rows[0]), (np.array(rows, dtype=np.uint16),))


def counts_of(samples: Samples, vocab_size: int) -> Any:
    return samples.counts(vocab_size)


def two_kinds(count: int = 400) -> tuple[Samples, int]:
    """Rows in which 5 to 9 and 10 to 14 stand in the same surroundings each: letters and figures, so to speak."""
    chance = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        kind = chance.integers(2)
        middle = chance.integers(5 + 5 * kind, 10 + 5 * kind, 3)
        around = chance.integers(15 + 5 * kind, 20 + 5 * kind, 3)
        rows.append([CLS, *np.stack([middle, around], 1).reshape(-1).tolist(), SEP])
    return samples_of(rows), 26  # 25 never occurs


def test_neighbours_are_counted_by_place_and_by_distance() -> None:
    samples = samples_of([[CLS, 5, 6, 5, 7, SEP]])
    tables = neighbour_tables([samples], counts_of(samples, 8), SPECIAL)
    # Contexts: 5 (twice), then 6 and 7.
    left_1, right_1, left_2, right_2, near = (table[5:].tolist() for table in tables)
    assert left_1 == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]  # before 5: 6; before 6: 5; before 7: 5
    assert right_1 == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert left_2 == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert right_2 == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    third = 1 / 3
    assert near == [
        pytest.approx([1, 2, 1 + third]),
        pytest.approx([2, 0, 1 / 2]),
        pytest.approx([1 + third, 1 / 2, 0]),
    ]
    assert not any(table[:5].any() for table in tables)


def test_mutual_information_is_positive_and_smoothed() -> None:
    table = torch.tensor([[9.0, 1.0, 0.0], [1.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    to_mutual_information(table)
    # p(c) is 1/2 for both contexts that occur, smoothed or not: log(0.9 / 0.5), and below zero for 0.1.
    assert table.tolist() == [pytest.approx([np.log(1.8), 0, 0]), pytest.approx([0, np.log(1.8), 0]), [0, 0, 0]]


def test_factors_give_the_table_back() -> None:
    chance = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 6, generator=chance)
    table = vectors @ vectors.T  # its left singular vectors times the roots of the values are vectors too, turned
    found = factorise(table, 8, chance)
    torch.testing.assert_close(found @ found.T, table, rtol=0, atol=1e-4)
    assert factorise(table[:, :3], 8, chance)[:, 3:].abs().max() < 1e-4, "only so many as the table has"


def test_words_of_one_kind_lie_close_together() -> None:
    samples, vocab_size = two_kinds()
    vectors = word_vectors([samples], counts_of(samples, vocab_size), SPECIAL, 8, seed=1)
    assert vectors.shape == (vocab_size, 8)
    assert not vectors[SPECIAL].any()
    assert not vectors[25].any(), "a token that never occurs"
    assert float(vectors[5:25].pow(2).mean().sqrt()) == pytest.approx(SCALE, rel=1e-4)
    near = torch.nn.functional.normalize(vectors[5:15], dim=1)
    likeness = near @ near.T
    assert likeness[:5, :5].min() > likeness[:5, 5:].max()
    assert torch.equal(vectors, word_vectors([samples], counts_of(samples, vocab_size), SPECIAL, 8, seed=1))


def test_a_long_text_is_counted_in_parts_spread_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, vocab_size = two_kinds()
    counts = counts_of(samples, vocab_size)
    whole = neighbour_tables([samples], counts, SPECIAL)
    monkeypatch.setattr(cooccurrence, "CHUNK_ROWS", 100)
    parts = neighbour_tables([samples], counts, SPECIAL)
    assert all(torch.allclose(a, b) for a, b in zip(whole, parts, strict=True))
    monkeypatch.setattr(cooccurrence, "MOST_CHUNKS", 2)
    first_and_last = np.r_[np.arange(100), np.arange(300, 400)]
    assert (np.concatenate(list(cooccurrence.chunks([samples]))) == samples.fetch(first_and_last)).all()


def test_of_many_small_sets_every_row_is_counted() -> None:
    sets = [samples_of([[CLS, 5 + number, 6 + number, SEP]]) for number in range(9)]
    assert [rows.tolist() for rows in cooccurrence.chunks(sets)] == [s.fetch(np.arange(1)).tolist() for s in sets]


def test_sets_are_counted_as_if_one_stood_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _ = two_kinds()
    monkeypatch.setattr(cooccurrence, "CHUNK_ROWS", 150)
    monkeypatch.setattr(cooccurrence, "MOST_CHUNKS", 2)
    rows = np.concatenate(list(cooccurrence.chunks([samples, samples])))  # of 800 rows the first 150, and the last 50
    assert (rows == samples.fetch(np.r_[np.arange(150), np.arange(350, 400)])).all()


def test_a_text_without_neighbours_gives_zeros() -> None:
    samples = samples_of([[CLS, 5, SEP]])
    assert not word_vectors([samples], counts_of(samples, 8), SPECIAL, 4, seed=0).any()


def test_a_fresh_model_begins_with_them(train_mlm: Callable[..., Outcome]) -> None:
    begun = {
        how: load_checkpoint(train_mlm(word_vectors=how, learning_rate=1e-9, max_iters=1, run_id=how).run).model
        for how in ("random", "counts")
    }
    sizes = {
        how: float(model.embeddings.word_embeddings.weight[5:].detach().pow(2).mean().sqrt())
        for how, model in begun.items()
    }
    assert sizes["counts"] == pytest.approx(SCALE, rel=0.15)  # those of tokens that do not occur are drawn
    assert sizes["random"] == pytest.approx(0.0176, rel=0.1)
    assert not begun["counts"].embeddings.word_embeddings.weight[0].any(), "[PAD] stays zero"


@pytest.mark.parametrize("heads", [2, 5])
def test_heads_begin_by_looking_at_neighbours_and_for_what_is_like(heads: int) -> None:
    sizes = {"hidden_size": 64 * heads, "num_attention_heads": heads, "local_attention": 16}
    config = preset_config("modern", "mini", 300, max_position_embeddings=40, pad_token_id=0, **sizes)
    model = BertForMaskedLM(config, torch.Generator().manual_seed(0))
    words = model.embeddings.word_embeddings.weight.detach()
    before = words.clone()
    look_at_neighbours(model, torch.Generator().manual_seed(1))
    assert not words[0].any(), "[PAD] stays zero"
    directions = torch.nn.functional.normalize(words[1:300], dim=1)
    assert float((directions @ directions.T).mean()) == pytest.approx(0.2, abs=0.03)  # a fifth of the squared length
    assert float(words.norm() / before.norm()) == pytest.approx(1.25**0.5, rel=0.02)
    with torch.no_grad():
        ids = torch.randint(5, 300, (4, 40), generator=torch.Generator().manual_seed(2))
        qkv = model.encoder.layers[0].attention.qkv_proj(model.embeddings(ids, None))
        q, k, _ = qkv.view(4, 40, 3, heads, 64).permute(2, 0, 3, 1, 4).unbind(0)
        angles = rotary_angles(40, 64, config.rope_theta, ids.device)
        weights = (rotate(q, *angles) @ rotate(k, *angles).transpose(-1, -2) / 8).softmax(dim=-1)
    look_for_the_like(model)
    for block, alike in zip(model.encoder.layers, (False, False, False, True), strict=True):
        queries, keys, _ = block.attention.qkv_proj.weight.detach().chunk(3)
        assert torch.equal(queries, keys) is alike
        assert float(queries[-8:].std()) == pytest.approx(0.0352 if alike else 0.0176, rel=0.05)
    for head, distance in zip(range(heads), (-1, 1, -2, 2, -3), strict=False):
        inside = torch.arange(3, 37)
        assert weights[:, head, inside, inside + distance].mean() > 0.6, distance
