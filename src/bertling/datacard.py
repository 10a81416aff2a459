"""What a user should know of prepared data: its size, its oddities, its floors and its splits."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SplitCard:
    """One split."""

    path: str
    """Its name in the output folder."""
    documents: int
    samples: int
    tokens: int
    """Without padding, with [CLS] and [SEP]."""
    padded_samples: int
    dropped_tokens: int
    """Tokens of text that are in no sample."""
    unigram_accuracy: float
    """Share of its ordinary tokens that are the most frequent training token."""
    unigram_cross_entropy: float
    """Nats a token under the training unigram distribution."""


@dataclass(frozen=True)
class DataCard:
    """One preparation."""

    label: str
    seq_len: int
    seed: int
    method: str
    format: str
    vocab_size: int
    vocab_fingerprint: str
    documents: int
    dropped_documents: int
    """Left out: repeated, where duplicates are dropped, or without any text."""
    lines: int
    dropped_lines: int
    characters: int
    tokens: int
    """Of text, before rows are cut."""
    unk_tokens: int
    duplicate_documents: int
    duplicate_lines: int
    unigram_accuracy: float
    """Of the training split: the share of its most frequent token."""
    unigram_entropy: float
    """Nats: the entropy of the training split's unigram distribution."""
    splits: dict[str, SplitCard]
    overlap: dict[str, dict[str, int]]
    """For each pair of splits, the identical documents and the identical samples in both."""
    notes: list[str]
    seconds: float

    @property
    def unk_share(self) -> float:
        """[UNK] among the tokens."""
        return self.unk_tokens / max(1, self.tokens)

    @property
    def tokens_per_character(self) -> float:
        """Tokens a character of text."""
        return self.tokens / max(1, self.characters)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, shares included."""
        documents, lines = self.documents + self.dropped_documents, self.lines + self.dropped_lines  # that were read
        return {
            **asdict(self),
            "unk_percent": 100 * self.unk_share,
            "duplicate_documents_percent": 100 * self.duplicate_documents / max(1, documents),
            "duplicate_lines_percent": 100 * self.duplicate_lines / max(1, lines),
            "tokens_per_character": self.tokens_per_character,
            "characters_per_token": self.characters / max(1, self.tokens),
        }

    def text(self) -> str:
        """A page for people."""
        values = self.to_dict()
        lines = [
            f"data card: {self.label}, {self.seq_len} tokens a sample, method {self.method}, seed {self.seed}",
            f"  documents   {self.documents:,} ({self.duplicate_documents:,} duplicates, "
            f"{values['duplicate_documents_percent']:.2f} % of those read)",
            f"  lines       {self.lines:,} ({self.duplicate_lines:,} duplicates, "
            f"{values['duplicate_lines_percent']:.2f} % of those read)",
            f"  tokens      {self.tokens:,} of {self.vocab_size:,} kinds, {values['unk_percent']:.3f} % [UNK]",
            f"  characters  {self.characters:,}: {self.tokens_per_character:.3f} tokens a character, "
            f"{values['characters_per_token']:.2f} characters a token",
            f"  floors      always the most frequent token: {100 * self.unigram_accuracy:.2f} % right; "
            f"unigram entropy {self.unigram_entropy:.3f} nats",
        ]
        for name, split in self.splits.items():
            lines.append(
                f"  {name:<6}{split.samples:>11,} samples, {split.tokens:,} tokens, {split.documents:,} documents, "
                f"{split.padded_samples:,} padded, {split.dropped_tokens:,} tokens left over; floor "
                f"{100 * split.unigram_accuracy:.2f} %, {split.unigram_cross_entropy:.3f} nats -> {split.path}"
            )
        for pair, both in self.overlap.items():
            lines.append(f"  {pair}: {both['documents']:,} documents and {both['samples']:,} samples in both")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, f"  made in {self.seconds:.1f} s"])
