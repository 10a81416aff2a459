"""Which text goes to which split: whole documents, dealt out in the proportions, so that none is in two splits.

A document's split follows from the corpus and the shares alone: data sets of several seeds may be mixed.
"""

import math
import sys
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from bertling.corpus import Corpus
from bertling.files import BertlingError
from bertling.packed import Ids

SPLITS = ("train", "val", "test")
DEFAULT_SPLIT = (0.8, 0.1, 0.1)
_ORDER = 11
"""Keeps this random stream apart from others of the same seed."""


@dataclass(frozen=True)
class Part:
    """The text of one split."""

    corpus: Corpus
    spans: Ids
    """[n, 2]: stretches of the corpus's ids in reading order: documents (method split) or rows (segment)."""
    hashes: npt.NDArray[np.uint64]
    """One for each document that it has text of."""

    @property
    def tokens(self) -> int:
        """Ids of text."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def parse_shares(text: str | None) -> tuple[float, float, float] | None:
    """Three shares, as 0.8,0.1,0.1."""
    if text is None:
        return None
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise BertlingError(f"split: {text}: must be three numbers, as 0.8,0.1,0.1") from None
    return train, val, test


def shares_of(split: tuple[float, float, float] | None, has_val: bool, has_test: bool) -> dict[str, float]:
    """Shares of `inputs` for each split that is cut from it; they add up to 1."""
    given = {"val": has_val, "test": has_test}
    if split is not None and has_val and has_test:
        raise BertlingError("split: val-input and test-input are given, so that nothing is left to cut; leave it out")
    if split is None:
        split = (1.0, 0.0, 0.0) if has_val or has_test else DEFAULT_SPLIT
    if len(split) != 3 or not all(math.isfinite(s) and s >= 0 for s in split) or abs(sum(split) - 1) > 1e-3:
        raise BertlingError(f"split: must be three shares that add up to 1, such as 0.8,0.1,0.1, not {split}")
    if split[0] <= 0:
        raise BertlingError(f"split: the share of train must be above 0, not {split}")
    shares = {name: s for name, s in zip(SPLITS, split, strict=True) if s > 0 and not given.get(name, False)}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def deal(corpus: Corpus, shares: dict[str, float], seed: int) -> tuple[dict[str, Part], list[str]]:
    """Give whole documents to the splits in the proportions, in tokens; identical documents go together.

    They are dealt in the order of their hashes, whatever the seed, which shuffles the documents of train only: what
    one seed trains on never validates another.
    """
    starts, stops = corpus.documents[:-1], corpus.documents[1:]
    filled = np.flatnonzero(stops > starts)
    hashes = _document_hashes(corpus, filled)
    different, groups = np.unique(hashes, return_inverse=True)
    tokens = (stops - starts)[filled]
    split_of = _assign(tokens, groups, shares)
    if not _near(np.array([tokens[split_of == index].sum() for index in range(len(shares))]), shares):
        told = ", ".join(f"{share:.0%}" for share in shares.values())
        return _blocks(corpus, shares, filled, hashes), [
            f"{len(different)} different document(s) are too few, or too unequal, to be dealt out as {told}: cut into "
            "contiguous blocks"
        ]
    parts = {}
    for index, name in enumerate(shares):
        mine = np.flatnonzero(split_of == index)
        if name == "train":
            mine = np.random.default_rng([seed, _ORDER]).permutation(mine)
        parts[name] = Part(corpus, _spans(corpus, filled[mine]), hashes[mine])
    return parts, []


def _assign(tokens: Ids, groups: Ids, shares: dict[str, float]) -> Ids:
    """The split of each document: one group after the other goes where most tokens are still lacking."""
    group_tokens = np.bincount(groups, weights=tokens)
    lacking = [share * float(tokens.sum()) for share in shares.values()]
    split_of_group = np.zeros(len(group_tokens), dtype=np.int64)
    for group, size in enumerate(group_tokens.tolist()):
        best = lacking.index(max(lacking))
        split_of_group[group] = best
        lacking[best] -= size
    for index in range(len(lacking)):
        if not (split_of_group == index).any():
            donor = int(np.bincount(split_of_group, minlength=len(lacking)).argmax())
            candidates = np.flatnonzero(split_of_group == donor)
            split_of_group[candidates[group_tokens[candidates].argmin()]] = index
    return split_of_group[groups]


def _near(tokens: Ids, shares: dict[str, float]) -> bool:
    """Whether train got three quarters of its share and each other split half of its own."""
    least = [(0.75 if name == "train" else 0.5) * share for name, share in shares.items()]
    return bool((tokens >= np.array(least) * tokens.sum()).all())


def _blocks(corpus: Corpus, shares: dict[str, float], filled: Ids, hashes: npt.NDArray[np.uint64]) -> dict[str, Part]:
    """The text in contiguous blocks, where its documents cannot be dealt out; `hashes` are those of the `filled`."""
    pieces = corpus.pieces is not None
    units = _spans(corpus, np.arange(len(corpus.documents) - 1))
    number = len(units) if pieces else len(corpus.ids)
    wanted = (np.cumsum(list(shares.values())) * len(corpus.ids)).round().astype(np.int64)
    wanted = np.searchsorted(units[:, 0], wanted) if pieces else wanted
    # Each split gets something as long as there is enough, train first.
    least = np.minimum(np.arange(1, len(shares) + 1), number)
    ends = wanted.clip(least, np.maximum(least, number - np.arange(len(shares))[::-1])).tolist()
    starts, stops = corpus.documents[filled], corpus.documents[filled + 1]
    parts = {}
    for name, first, last in zip(shares, [0, *ends], ends, strict=False):
        spans = units[first:last] if pieces else np.array([[first, last]], dtype=np.int64)
        begin, end = spans.min(initial=len(corpus.ids)), spans.max(initial=0)
        parts[name] = Part(corpus, spans, hashes[(starts < end) & (stops > begin)])
    return parts


def whole(corpus: Corpus) -> Part:
    """A corpus as one split, in the order of its files."""
    documents = np.flatnonzero(corpus.documents[1:] > corpus.documents[:-1])
    return Part(corpus, _spans(corpus, documents), _document_hashes(corpus, documents))


def _spans(corpus: Corpus, documents: Ids) -> Ids:
    """[n, 2]: the documents one after the other, or the pieces of these documents if the corpus has pieces."""
    firsts, lasts = corpus.documents[documents], corpus.documents[documents + 1]
    if corpus.pieces is None:
        return np.stack([firsts, lasts], axis=1)
    # Pieces never cross documents, so a document's pieces are a run of offsets.
    pieces = np.unique(corpus.pieces)
    begins = np.searchsorted(pieces, firsts)
    counts = np.searchsorted(pieces, lasts) - begins
    index = np.arange(counts.sum()) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
    return np.stack([pieces[index], pieces[index + 1]], axis=1)


def _document_hashes(corpus: Corpus, documents: Ids) -> npt.NDArray[np.uint64]:
    # A plain view: slicing a memmap object costs several times as much.
    ids, offsets = np.asarray(corpus.ids), corpus.documents
    hashes = np.zeros(len(documents), dtype=np.uint64)
    for place, document in enumerate(documents):
        digest = blake2b(ids[offsets[document] : offsets[document + 1]].data, digest_size=8).digest()
        hashes[place] = int.from_bytes(digest, sys.byteorder)
    return hashes
