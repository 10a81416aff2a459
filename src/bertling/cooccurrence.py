"""Word vectors from counting: which tokens stand beside which, as a head start for the word embeddings.

A network that begins at random spends much of a small budget on finding out which words are alike. Counts tell that in
seconds: the positive pointwise mutual information of tokens and their neighbours (Levy, Goldberg & Dagan 2015, sections
2.1 and 3), factorised into short vectors (Levy & Goldberg 2014; the factors by Halko, Martinsson & Tropp 2011).

Shapes: N rows, T ids a row, V vocabulary, C contexts, D hidden.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bertling.packed import Ids
from bertling.progress import ByteProgress
from bertling.samples import Samples

REACH = 5
"""Neighbours to either side that are counted."""
OWN_PLACES = 2
"""The nearest of them have a table for each place (what stands right before, right after ...); all share one more."""
CONTEXTS = 2048
"""Neighbours that are told apart: the commonest tokens."""
CHUNK_ROWS, MOST_CHUNKS = 1 << 16, 4
"""Rows counted at a time, and how often at most: 34 million tokens in rows of 128, evenly spread over the text."""
SMOOTHING = 0.75
"""Power that keeps rare contexts from looking more telling than they are."""
SCALE = 0.1
"""Root mean square of the vectors' entries: larger than fresh weights, so that training refines them."""


def word_vectors(train: Sequence[Samples], counts: Ids, special_ids: Sequence[int], width: int, seed: int) -> Tensor:
    """Vectors [V, D] of the tokens in `train`, zero for special tokens and those without a neighbour.

    `counts` [V] says how often each token occurs. A function of its arguments: the factorisation's chance is seeded.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = neighbour_tables(train, counts, special_ids)
    known = tables[-1].sum(dim=1, keepdim=True) > 0
    for table in tables:
        to_mutual_information(table)
    vectors = factorise(torch.cat(tables, dim=1), width, generator)
    vectors = torch.where(known, vectors - vectors.sum(dim=0) / known.sum().clamp(min=1), 0.0)
    # The factors come in the order of their size; turned at random, every column of the network gets its share.
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    vectors = vectors @ turn
    size = (vectors.pow(2).sum() / (known.sum() * width).clamp(min=1)).sqrt()
    scaled: Tensor = vectors * SCALE / size.clamp(min=1e-12)
    return scaled


def neighbour_tables(train: Sequence[Samples], counts: Ids, special_ids: Sequence[int]) -> list[Tensor]:
    """How often each token has which neighbour, [V, C] each: one place to the left, to the right, two to the left ...

    In the last table all neighbours up to REACH places away count, those at distance d as 1/d.
    """
    ordinary = counts.copy()
    ordinary[list(special_ids)] = 0
    contexts = np.argsort(-ordinary, kind="stable")[: min(CONTEXTS, int((ordinary > 0).sum()))]
    columns = np.full(len(counts), len(contexts), dtype=np.int64)  # one more, thrown away: all the others
    columns[contexts] = np.arange(len(contexts))
    shape = (len(counts), len(contexts) + 1)
    tables = [torch.zeros(shape) for _ in range(2 * OWN_PLACES + 1)]
    for rows in chunks(train):
        row_columns = columns[rows]
        for distance in range(1, min(REACH, rows.shape[1] - 1) + 1):
            left, right = slice(None, -distance), slice(distance, None)
            for side, (words, neighbours) in enumerate(((right, left), (left, right))):
                keys = rows[:, words] * shape[1] + row_columns[:, neighbours]
                seen = torch.from_numpy(np.bincount(keys.reshape(-1), minlength=shape[0] * shape[1])).view(shape)
                if distance <= OWN_PLACES:
                    tables[2 * (distance - 1) + side] += seen
                tables[-1].add_(seen, alpha=1 / distance)
    for table in tables:
        table[list(special_ids)] = 0
    return [table[:, :-1].contiguous() for table in tables]


def chunks(train: Sequence[Samples]) -> Iterator[Ids]:
    """Rows [n, T] before any masking, evenly spread over the sets, as if these were one after the other."""
    ends = np.cumsum([samples.rows for samples in train])
    starts = range(0, int(ends[-1]), CHUNK_ROWS)
    chosen = np.linspace(0, len(starts) - 1, min(MOST_CHUNKS, len(starts))).round().astype(int)
    spans = [(starts[place], min(starts[place] + CHUNK_ROWS, int(ends[-1]))) for place in chosen]
    done, total = 0, sum(end - start for start, end in spans)
    with ByteProgress("counting neighbours") as progress:
        for start, end in spans:
            for samples, last in zip(train, ends.tolist(), strict=True):
                first = last - samples.rows  # of this set
                places = np.arange(max(start, first), min(end, last)) - first
                if len(places):
                    rows = samples.fetch_originals(places)
                    yield rows
                    done += len(rows)
                    progress(2 * done * rows.shape[1], 2 * total * rows.shape[1])


def to_mutual_information(table: Tensor) -> None:
    """Counts [V, C] to max(0, log p(w, c) / (p(w) p(c))), in place."""
    of_context = table.sum(dim=0) ** SMOOTHING
    table /= table.sum(dim=1, keepdim=True).clamp(min=1)
    table /= (of_context / of_context.sum().clamp(min=1)).clamp(min=1e-12)
    table.clamp_(min=1).log_()


def factorise(table: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Vectors [V, D] whose products come near those of the table's rows: its left singular vectors times the roots of
    the singular values, by subspace iteration; where the table has fewer than D of them, zeros follow."""
    rank = min(width + 32, *table.shape)
    basis, _ = torch.linalg.qr(table @ torch.randn(table.shape[1], rank, generator=generator))
    for _ in range(3):
        basis, _ = torch.linalg.qr(table @ (table.T @ basis))
    left, sizes, _ = torch.linalg.svd(basis.T @ table, full_matrices=False)
    found = min(width, rank)
    vectors = torch.zeros(len(table), width)
    vectors[:, :found] = (basis @ left[:, :found]) * sizes[:found].sqrt()
    return vectors
