"""Masking for masked language modelling as a pure function: ids and a generator in, corrupted ids and targets out.

Shapes: B batch, T tokens, S slots a row (a constant for given T and probability), M = B * S, V vocabulary.
Recipe: BERT (Devlin et al. 2019, section 3.1), with an exact number of masked places in each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bertling.files import BertlingError
from bertling.packed import IGNORED

MASK_SHARE = 0.8
"""Chosen places that become [MASK]."""
RANDOM_SHARE = 0.1
"""Chosen places that become a random ordinary token; the rest stays as it was."""


@dataclass(frozen=True)
class Masked:
    """A corrupted batch, with the places that are scored in a constant number of slots."""

    input_ids: Tensor
    """Long [B, T]."""
    wanted: Tensor
    """Long [M]: flat indices into B * T, the model's `wanted`, the slots of a row side by side; 0 in an unused slot."""
    labels: Tensor
    """Long [M]: the original id, -100 in an unused slot."""
    count: int
    """Slots in use."""


def slots_per_row(seq_len: int, mlm_probability: float) -> int:
    """Slots S that hold the masked places of any row of `seq_len` ids with its [CLS] and [SEP]."""
    if not 0.0 < mlm_probability <= 1.0:
        raise BertlingError(f"mlm-probability: must lie above 0 and not above 1, not {mlm_probability}")
    return max(1, round(mlm_probability * (seq_len - 2)))


def mask_tokens(
    input_ids: Tensor,
    *,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    mlm_probability: float = 0.15,
    continues: Tensor | None = None,
) -> Masked:
    """Mask max(1, round(p * n)) of the n ordinary places of each row of input_ids [B, T] (none where n is 0).

    Of the chosen places 80 % become [MASK], 10 % a random ordinary id (never a special one), 10 % stay.
    `continues`, bool [V], says which ids go on with a word ("##..."): then words are masked whole (as in the whole-word
    models of BERT's authors, 2019), in random order as long as they fit into that number.
    """
    batch, seq_len = input_ids.shape
    slots = slots_per_row(seq_len, mlm_probability)
    is_special, ordinary = _tables(tuple(special_ids), vocab_size)
    special = is_special[input_ids]
    places = seq_len - special.sum(dim=1)
    quota = (places.double() * mlm_probability).round().long().clamp(1, slots).minimum(places)
    scores = torch.rand(batch, seq_len, generator=generator)
    if continues is None:
        # Scores lie below 1, so special tokens come last.
        columns = scores.masked_fill_(special, 2.0).topk(slots, dim=1, largest=False).indices
        used = torch.arange(slots) < quota[:, None]
    else:
        columns, used = _whole_words(scores, ~continues[input_ids] | special, special, quota, slots)
    positions = columns + torch.arange(0, batch * seq_len, seq_len)[:, None]
    original = input_ids.reshape(-1)[positions]
    draw = torch.rand(batch, slots, generator=generator)
    random_ids = ordinary[torch.randint(len(ordinary), (batch, slots), generator=generator)]
    replaced = torch.where(draw < MASK_SHARE + RANDOM_SHARE, random_ids, original)
    replaced = replaced.masked_fill(draw < MASK_SHARE, mask_id)
    corrupted = input_ids.clone()
    corrupted.view(-1)[positions] = torch.where(used, replaced, original)
    return Masked(
        input_ids=corrupted,
        wanted=positions.masked_fill(~used, 0).reshape(-1),
        labels=original.masked_fill(~used, IGNORED).reshape(-1),
        count=int(used.sum()),
    )


def _whole_words(scores: Tensor, starts: Tensor, special: Tensor, quota: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Columns [B, S], whole words in the order of one random score each, and which of them are used [B, S].

    A word that would exceed its row's quota [B] is left out, and the next ones are tried, as by Devlin et al.
    """
    word = starts.cumsum(dim=1) - starts[:, :1].long()  # [B, T]: 0, 1, 2 ... along each row
    sizes = torch.zeros_like(word).scatter_add_(1, word, (~special).long())  # [B, T]: tokens of each word; 0: none
    order = scores.masked_fill(sizes == 0, 2.0).argsort(dim=1)  # [B, T]: words, one score each; what is none comes last
    left, taken = quota.clone(), torch.zeros_like(special)  # [B], [B, T]
    for number in range(int((sizes > 0).sum(dim=1).max())):
        now = order[:, number, None]  # [B, 1]
        size = sizes.gather(1, now)[:, 0]
        fits = (size <= left) & (size > 0)
        left -= size * fits
        taken.scatter_(1, now, fits[:, None])
        if not left.any():
            break
    chosen = taken.gather(1, word) & ~special  # [B, T]
    columns = (~chosen).int().sort(dim=1, stable=True).indices[:, :slots]
    return columns, torch.arange(slots) < chosen.sum(dim=1)[:, None]


def static_masks(input_ids: Tensor, labels: Tensor, *, slots: int | None = None) -> Masked:
    """The masks that come with the rows: labels [B, T] hold the original id at masked places, -100 elsewhere.

    `slots`: slots a row, at least the largest number of masked places in a row (which is the default).
    """
    batch, seq_len = input_ids.shape
    masked = labels != IGNORED
    counts = masked.sum(dim=1)
    slots = max(1, int(counts.max())) if slots is None else slots
    columns = (~masked).int().sort(dim=1, stable=True).indices[:, :slots]
    used = torch.arange(slots) < counts[:, None]
    positions = columns + torch.arange(0, batch * seq_len, seq_len)[:, None]
    return Masked(
        input_ids=input_ids,
        wanted=positions.masked_fill(~used, 0).reshape(-1),
        labels=labels.gather(1, columns).reshape(-1),
        count=int(counts.sum()),
    )


@lru_cache(maxsize=8)
def _tables(special_ids: tuple[int, ...], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Whether an id is special, bool [V], and the ordinary ids, long [V - specials]."""
    is_special = torch.zeros(vocab_size, dtype=torch.bool)
    is_special[list(special_ids)] = True
    return is_special, torch.arange(vocab_size)[~is_special]
