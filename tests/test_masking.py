"""Masking: exact numbers, the 80/10/10 shares, and what must never be masked or drawn."""

import pytest
import torch
from torch import Tensor

from bertling.files import BertlingError
from bertling.masking import Masked, mask_tokens, slots_per_row, static_masks
from bertling.packed import IGNORED

SPECIAL = (0, 1, 2, 3, 4)
VOCAB = 60


def draw(
    ids: Tensor,
    seed: int = 0,
    probability: float = 0.15,
    special: tuple[int, ...] = SPECIAL,
    continues: Tensor | None = None,
) -> Masked:
    return mask_tokens(
        ids,
        special_ids=special,
        mask_id=4,
        vocab_size=VOCAB,
        generator=torch.Generator().manual_seed(seed),
        mlm_probability=probability,
        continues=continues,
    )


def rows(batch: int, seq_len: int, seed: int = 0) -> Tensor:
    ids = torch.randint(5, VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


def per_row(masked: Masked) -> list[int]:
    return (masked.labels.view(len(masked.input_ids), -1) != IGNORED).sum(1).tolist()


def test_statistics() -> None:
    ids = rows(2000, 128)
    masked = draw(ids)
    seen = masked.input_ids.view(-1)[masked.wanted]
    assert masked.count == 2000 * 19 == int((masked.labels != IGNORED).sum())
    assert (masked.labels == ids.view(-1)[masked.wanted]).all()
    total = masked.count
    as_mask, as_kept = int((seen == 4).sum()), int((seen == masked.labels).sum())
    random = total - as_mask - as_kept
    # Four standard deviations of a binomial; a 55th of the random draws hits the original again.
    for found, share in ((as_mask, 0.8), (random, 0.1 * 54 / 55), (as_kept, 0.1 + 0.1 / 55)):
        assert abs(found - share * total) < 4 * (share * (1 - share) * total) ** 0.5
    columns = torch.bincount(masked.wanted % 128, minlength=128)[1:-1]
    expected = total / 126
    assert ((columns - expected).abs() < 5 * expected**0.5).all(), "each place is as likely as any other"


def test_specials_are_never_masked_or_drawn() -> None:
    ids = rows(500, 32)
    ids[:, 10] = 1
    ids[:, 20:] = 0
    ids[:, 19] = 3
    masked = draw(ids, probability=0.5)
    used = masked.labels != IGNORED
    assert not torch.isin(masked.labels[used], torch.tensor(SPECIAL)).any()
    seen = masked.input_ids.view(-1)[masked.wanted[used]]
    assert not torch.isin(seen[seen != 4], torch.tensor(SPECIAL)).any()
    special = torch.isin(ids, torch.tensor(SPECIAL))
    assert (masked.input_ids[special] == ids[special]).all()
    assert per_row(masked) == [round(0.5 * 17)] * 500


def test_nothing_changes_elsewhere_and_positions_are_distinct() -> None:
    ids = rows(50, 40)
    before = ids.clone()
    masked = draw(ids)
    assert (ids == before).all(), "the input is left alone"
    changed = (masked.input_ids != ids).view(-1).nonzero().view(-1)
    positions = masked.wanted[masked.labels != IGNORED]
    assert torch.isin(changed, positions).all()
    assert len(positions.unique()) == len(positions)


@pytest.mark.parametrize(("seq_len", "slots"), [(3, 1), (8, 1), (32, 4), (128, 19), (512, 76)])
def test_exact_counts_in_static_shapes(seq_len: int, slots: int) -> None:
    assert slots_per_row(seq_len, 0.15) == slots
    full = draw(rows(7, seq_len))
    assert per_row(full) == [slots] * 7
    padded = rows(7, seq_len)
    padded[:, 2:] = 0
    partly = draw(padded)
    assert per_row(partly) == [1] * 7
    assert full.wanted.shape == partly.wanted.shape == (7 * slots,)
    assert (partly.wanted[partly.labels == IGNORED] == 0).all()


def test_every_length_gets_its_rounded_share() -> None:
    ids = torch.zeros(126, 128, dtype=torch.long)
    for length in range(1, 127):
        ids[length - 1, 1 : length + 1] = 7
    assert per_row(draw(ids)) == [max(1, round(0.15 * length)) for length in range(1, 127)]


def test_rows_without_a_maskable_place() -> None:
    ids = torch.tensor([[2, 1, 3, 0, 0], [2, 9, 8, 7, 3], [0, 0, 0, 0, 0]])
    masked = draw(ids)
    assert per_row(masked) == [0, 1, 0]
    assert masked.count == 1
    assert (masked.input_ids[[0, 2]] == ids[[0, 2]]).all()
    nothing = draw(ids[[0]])
    assert (nothing.count, nothing.labels.tolist(), nothing.wanted.tolist()) == (0, [IGNORED], [0])


def test_same_seed_same_masks_other_seed_others() -> None:
    ids = rows(20, 64)
    first, again, other = draw(ids, 5), draw(ids, 5), draw(ids, 6)
    assert (first.input_ids == again.input_ids).all()
    assert (first.wanted == again.wanted).all()
    assert not (first.wanted == other.wanted).all()


def test_special_tokens_in_other_places() -> None:
    ids = rows(300, 32)
    masked = draw(ids, probability=0.9, special=(30, 31, 2, 3, 4))
    used = masked.labels != IGNORED
    seen = masked.input_ids.view(-1)[masked.wanted[used]]
    drawn = seen[(seen != masked.labels[used]) & (seen != 4)]
    assert not torch.isin(drawn, torch.tensor((30, 31))).any()
    assert not torch.isin(masked.labels[used], torch.tensor((30, 31))).any()
    assert (drawn < 2).any(), "ids 0 and 1 are ordinary here"


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.01, float("nan")])
def test_probability_is_checked(probability: float) -> None:
    with pytest.raises(BertlingError, match="mlm-probability: must lie above 0 and not above 1"):
        slots_per_row(128, probability)


def test_static_masks() -> None:
    ids = torch.tensor([[2, 4, 8, 4, 3], [2, 9, 8, 7, 3], [2, 9, 4, 7, 3]])
    labels = torch.full((3, 5), IGNORED)
    labels[0, 1], labels[0, 3], labels[2, 2] = 11, 12, 13
    masked = static_masks(ids, labels)
    assert masked.wanted.tolist() == [1, 3, 0, 0, 12, 0]
    assert masked.labels.tolist() == [11, 12, IGNORED, IGNORED, 13, IGNORED]
    assert (masked.count, masked.input_ids is ids) == (3, True)
    wider = static_masks(ids, labels, slots=4)
    assert wider.wanted.shape == (12,)
    assert wider.labels[wider.labels != IGNORED].tolist() == [11, 12, 13]
    empty = static_masks(ids[1:2], labels[1:2])
    assert (empty.count, empty.labels.tolist()) == (0, [IGNORED])


CONTINUES = torch.arange(VOCAB) >= 40
"""Ids from 40 on go on with a word."""


def words_of(row: list[int]) -> list[list[int]]:
    """The places of each word of a row, specials left out."""
    words: list[list[int]] = []
    for place, index in enumerate(row):
        if index in SPECIAL:
            words.append([])
        elif CONTINUES[index] and words:
            words[-1].append(place)
        else:
            words.append([place])
    return [word for word in words if word]


@pytest.mark.parametrize("probability", [0.15, 0.4, 1.0])
def test_words_are_masked_whole_and_within_the_number(probability: float) -> None:
    ids = rows(300, 64, seed=5)
    ids[7, 20:] = 0
    masked = draw(ids, probability=probability, continues=CONTINUES)
    slots = slots_per_row(64, probability)
    used = (masked.labels != IGNORED).view(300, slots)
    chosen = torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, masked.wanted[used.flatten()], True)
    chosen = chosen.view_as(ids)
    assert masked.count == int(used.sum()) == int(chosen.sum())
    for row, places in zip(ids.tolist(), chosen, strict=True):
        words = words_of(row)
        assert all(len(set(places[word].tolist())) == 1 for word in words)
        assert int(places.sum()) == sum(int(places[word[0]]) * len(word) for word in words)
        wanted = max(1, round(probability * sum(map(len, words))))
        assert int(places.sum()) <= wanted
    assert used.float().mean() > 0.9 * min(1.0, (ids >= 5).float().mean() + 0.1)
    assert torch.equal(masked.labels[used.flatten()], ids.flatten()[masked.wanted[used.flatten()]])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])


def test_a_word_that_does_not_fit_makes_room_for_others() -> None:
    ids = torch.tensor([[2, *[10, 41, 42, 11, 12, 43, 13, 14, 15, 16] * 3, 3]]).repeat(6000, 1)
    masked = draw(ids, probability=0.2, continues=CONTINUES)
    used = masked.labels != IGNORED
    hits = torch.zeros(ids.numel()).index_fill(0, masked.wanted[used], 1.0).view_as(ids).mean(0)[1:-1]
    alone, of_three = hits[[3, 6, 7, 8, 9]].mean(), hits[[0, 1, 2]].mean()
    assert hits.mean() == pytest.approx(0.2, abs=0.001)  # 6 of 30, in every row
    assert alone == pytest.approx(0.23, abs=0.03)
    assert of_three == pytest.approx(0.15, abs=0.04)  # long words are the ones left out
    short = torch.tensor([[2, 10, 41, 42, 11, 12, 43, 3]]).repeat(500, 1)  # one place of six, and one word of one
    masked = draw(short, probability=0.15, continues=CONTINUES)
    assert masked.count == 500
    assert set(masked.labels.tolist()) == {11}
