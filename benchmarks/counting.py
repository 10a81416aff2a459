"""What counting alone finds behind the masks: which tokens stand one and two places to the left and right, no network.

    python benchmarks/counting.py --train wiki/datasets/train_wiki_128_123 --val wiki/datasets/val_wiki_128_123

For each of these four neighbours that is not masked itself, a table tells how much likelier each token is beside it
than anywhere (absolute discounting, Ney, Essen & Kneser 1994); the logarithms are added up, as in a product of experts
(Hinton 2002), with one weight for each table and one for the unigram model. These five numbers are fitted on training
rows that are not counted. A place that shows a token may show its own or a random one, as often as the masks say.

Scored by the protocol of `bertling evaluate`: the same frozen masks, all places. The four tables have as many entries
as the vocabulary squared, two bytes each: 0.5 GB for 8,192 tokens.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertling.batches import evaluation_batches
from bertling.masking import MASK_SHARE, RANDOM_SHARE, mask_tokens
from bertling.packed import IGNORED
from bertling.samples import Samples, open_samples
from bertling.tasks import EVAL_BATCH, EVAL_MASKS
from bertling.tokenizer import Tokenizer

PLACES = (-1, 1, -2, 2)
"""Where the neighbours stand."""
DISCOUNT = 0.7
"""Taken from every count, and given to the unigram model."""
FITTED = 200
"""Training rows that the weights are fitted on, evenly spread."""
CHUNK_ROWS = 1 << 16
LARGEST = 20_000
"""Entries of a vocabulary whose tables memory holds."""

Places = tuple[Tensor, Tensor, Tensor]
"""Of n scored places: the neighbours [n, 4] (-1 where there is none to see), the token shown [n] (-1 for [MASK]), and
the one that is right [n]."""


def count_pairs(train: Samples, size: int, every: int) -> list[Tensor]:
    """How often token a stands one and two places before token b, [V, V] each, but for every `every`-th row."""
    tables = [torch.zeros(size, size) for _ in range(2)]
    for start in range(0, train.rows, CHUNK_ROWS):
        indices = np.arange(start, min(start + CHUNK_ROWS, train.rows))
        rows = train.fetch_originals(indices[indices % every != 0])
        for distance, table in enumerate(tables, start=1):
            keys = rows[:, :-distance] * size + rows[:, distance:]
            table += torch.from_numpy(np.bincount(keys.reshape(-1), minlength=size * size)).view(size, size)
    return tables


def log_ratios(counts: Tensor, unigram: Tensor) -> Tensor:
    """log p(token | neighbour) / p(token), from counts [neighbours, tokens]; in half precision."""
    ratios = torch.empty(counts.shape, dtype=torch.half)
    for start in range(0, len(counts), 1024):
        part = counts[start : start + 1024]
        freed = DISCOUNT * (part > 0).sum(dim=1, keepdim=True) + 1
        smooth = (part - DISCOUNT).clamp(min=0) + freed * unigram
        ratios[start : start + 1024] = (smooth / (part.sum(dim=1, keepdim=True) + 1) / unigram).log().half()
    return ratios


def scored_places(input_ids: Tensor, positions: Tensor, labels: Tensor, mask_id: int) -> Places:
    """What is to be seen around the places of a masked batch [B, T]."""
    positions, labels = positions[labels != IGNORED], labels[labels != IGNORED]
    tokens, length = input_ids.flatten(), input_ids.shape[1]
    offsets = torch.tensor(PLACES)
    columns = positions[:, None] % length + offsets
    neighbours = tokens[(positions[:, None] + offsets).clamp(0, len(tokens) - 1)]
    hidden = (columns < 0) | (columns >= length) | (neighbours == mask_id)
    shown = tokens[positions]
    return neighbours.masked_fill(hidden, -1), shown.masked_fill(shown == mask_id, -1), labels


def fitting_places(train: Samples, tokenizer: Tokenizer, every: int) -> Places:
    """The scored places of the rows set aside."""
    masked = mask_tokens(
        torch.from_numpy(train.fetch_originals(np.arange(0, train.rows, every))),
        special_ids=tokenizer.special_ids,
        mask_id=tokenizer.mask_id,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator().manual_seed(EVAL_MASKS.seed),
        mlm_probability=EVAL_MASKS.mlm_probability,
    )
    return scored_places(masked.input_ids, masked.wanted, masked.labels, tokenizer.mask_id)


def validation_places(val: Samples, tokenizer: Tokenizer) -> Iterator[Places]:
    """The scored places of the validation set, as every evaluation draws them."""
    for batch in evaluation_batches(val, tokenizer, batch_size=EVAL_BATCH, **EVAL_MASKS._asdict()):
        assert batch.wanted is not None
        yield scored_places(batch.input_ids, batch.wanted, batch.labels, tokenizer.mask_id)


class CountingModel:
    """The tables and their weights."""

    def __init__(self, pairs: list[Tensor], special_ids: tuple[int, ...]) -> None:
        counts = pairs[0].sum(dim=0)
        unigram = (counts + 0.5) / (counts + 0.5).sum()
        self.unigram = unigram.log()
        self.unigram[list(special_ids)] = -30.0  # they are never behind a mask
        # In the order of PLACES.
        self.tables = [log_ratios(table, unigram) for pair in pairs for table in (pair, pair.T)]
        self.weights = torch.tensor([1.0, 0.8, 0.8, 0.4, 0.4], requires_grad=True)

    def evidence(self, neighbours: Tensor) -> Tensor:
        """What each table says, [n, 4] -> [5, n, V]; the unigram model comes first, hidden neighbours say nothing."""
        parts = [self.unigram.expand(len(neighbours), -1)]
        for table, ids in zip(self.tables, neighbours.T, strict=True):
            parts.append(table[ids.clamp(min=0)].float() * (ids >= 0)[:, None])
        return torch.stack(parts)

    def log_probabilities(self, evidence: Tensor, shown: Tensor) -> Tensor:
        """[5, n, V], [n] -> [n, V]."""
        scores = torch.einsum("k,knv->nv", self.weights, evidence).log_softmax(dim=-1)
        # A token that is shown is the right one with the share of those kept, else one of V at random.
        kept = (1 - MASK_SHARE - RANDOM_SHARE) / RANDOM_SHARE * scores.shape[1]
        seen = (shown >= 0).nonzero().squeeze(1)
        bonus = torch.zeros_like(scores)
        bonus[seen, shown[seen]] = float(np.log1p(kept))
        return (scores + bonus).log_softmax(dim=-1)

    def fit(self, places: Places) -> None:
        """Find the weights under which the right tokens are likeliest."""
        neighbours, shown, labels = places
        evidence = self.evidence(neighbours)
        optimizer = torch.optim.LBFGS([self.weights], max_iter=30, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.nll_loss(self.log_probabilities(evidence, shown), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="prepared rows to count in, with their vocabulary")
    parser.add_argument("--val", type=Path, required=True, help="prepared rows to score")
    options = parser.parse_args()
    train, val, tokenizer = open_samples(options.train), open_samples(options.val), Tokenizer.load(options.train)
    if tokenizer.vocab_size > LARGEST:
        parser.error(f"{options.train}: a vocabulary of {tokenizer.vocab_size:,}; the tables hold at most {LARGEST:,}")
    every = max(2, train.rows // FITTED)
    began = time.perf_counter()
    model = CountingModel(count_pairs(train, tokenizer.vocab_size, every), tokenizer.special_ids)
    counted = time.perf_counter()
    model.fit(fitting_places(train, tokenizer, every))
    fitted = time.perf_counter()
    loss, correct, count = 0.0, 0, 0
    with torch.inference_mode():
        for neighbours, shown, labels in validation_places(val, tokenizer):
            scores = model.log_probabilities(model.evidence(neighbours), shown)
            loss += float(F.nll_loss(scores, labels, reduction="sum"))
            correct += int((scores.argmax(dim=-1) == labels).sum())
            count += len(labels)
    weights = ", ".join(f"{weight:.2f}" for weight in model.weights.tolist())
    print(f"accuracy {correct / count:.1%}, loss {loss / count:.3f}, {count:,} places")
    print(f"weights: {weights}; {counted - began:.0f} s to count, {fitted - counted:.0f} s to fit")


if __name__ == "__main__":
    main()
