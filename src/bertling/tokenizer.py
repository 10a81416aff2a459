"""The WordPiece vocabulary: made from text, loaded, saved, and used to turn text into ids and back."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import filterfalse
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bertling.files import BertlingError, atomic_write, read_bounded, read_json, write_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PREFIX = "##"
_COVERAGE = 0.9999  # share of the characters that the alphabet must hold; the rest becomes [UNK]
_LEAST_COVERAGE = 0.99
_MOST_BYTES = 1 << 26  # of a vocab.txt
_USUAL = {
    "tokenizer_class": (
        *(f"{kind}Tokenizer{form}" for kind in ("Bert", "DistilBert", "PreTrained") for form in ("", "Fast")),
        "TokenizersBackend",
    ),
    "word_tokenizer_type": ("basic",),
    "subword_tokenizer_type": ("wordpiece",),
    "do_basic_tokenize": (True,),
}
"""What a tokenizer_config.json may say if its ids are to be BERT's."""
_ALPHABET_SHARE = 4  # at most one entry in so many is spent on a rarer character
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_LONGEST = 100  # characters of a word that is taken apart; a longer one is [UNK], as in BERT's own tokenizer


class Tokenizer:
    """BERT's tokenizer: normaliser, split at white space and punctuation, longest-match WordPiece with "##".

    `entries` are the vocabulary in the order of their ids; the five special tokens are found by name, not place.
    """

    def __init__(self, entries: Sequence[str], *, lowercase: bool = True, source: str = "vocabulary") -> None:
        """Build from entries; `source` names them in the error about a vocabulary that cannot be used."""
        _check_entries(entries, source)
        self.entries = tuple(entries)
        self.lowercase = lowercase
        self.ids = {entry: index for index, entry in enumerate(self.entries)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[name] for name in SPECIAL_TOKENS)
        self.special_ids = (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)
        self._backend = _backend(self.ids, lowercase)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a vocab.txt, or a folder that holds one (or a WordPiece tokenizer.json); unusable ones are refused."""
        if path.is_dir():
            if not (path / "vocab.txt").exists() and (path / "tokenizer.json").exists():
                return cls._load_json(path / "tokenizer.json")
            if not (path / "vocab.txt").exists():
                found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
                raise BertlingError(f"{path}: no vocab.txt in this folder (it holds {found}); name the vocabulary file")
            path = path / "vocab.txt"
        if path.suffix == ".json":
            return cls._load_json(path)
        entries = _read_entries(path)
        config, whole = path.with_name("tokenizer_config.json"), path.with_name("tokenizer.json")
        lowercase = True
        if path.name == "vocab.txt" and config.exists():
            lowercase = _lowercase_from(config)
        elif path.name == "vocab.txt" and whole.exists():
            lowercase = cls._load_json(whole).lowercase
        return cls(entries, lowercase=lowercase, source=str(path))

    @classmethod
    def _load_json(cls, path: Path) -> "Tokenizer":
        value = read_json(path, "tokenizer")
        model, normalizer = value.get("model"), value.get("normalizer")
        if not isinstance(model, dict) or model.get("type") != "WordPiece" or not isinstance(model.get("vocab"), dict):
            raise BertlingError(f"{path}: not a WordPiece tokenizer, and no other can be read; use another model")
        if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
            raise BertlingError(f"{path}: its text is not normalised as BERT's; use another model")
        try:
            ids: dict[str, Any] = {**model["vocab"], **{t["content"]: t["id"] for t in value.get("added_tokens") or []}}
            entries = sorted(ids, key=ids.__getitem__)
        except (KeyError, TypeError) as error:
            raise BertlingError(f"{path}: its vocabulary does not map entries to ids; remake the tokenizer") from error
        if [ids[entry] for entry in entries] != list(range(len(entries))):
            raise BertlingError(f"{path}: its ids are not 0 to {len(entries) - 1}, each once; remake the tokenizer")
        _check_standard(normalizer, path, "handle_chinese_chars")
        return cls(entries, lowercase=bool(normalizer.get("lowercase", True)), source=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included."""
        return len(self.entries)

    @cached_property
    def continues(self) -> list[bool]:
        """Whether each entry goes on with a word that an entry before it began."""
        return [entry.startswith(_PREFIX) and entry != _PREFIX for entry in self.entries]

    @property
    def id_type(self) -> np.dtype[np.unsignedinteger[Any]]:
        """What ids are stored as: little-endian uint16, or uint32 for 65,536 entries or more."""
        return np.dtype("<u2" if self.vocab_size < 65_536 else "<u4")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the entries in order and the lowercase flag: equal if and only if the ids mean the same."""
        return hashlib.sha256(json.dumps([self.entries, self.lowercase]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without [CLS] and [SEP] around it; "[MASK]" and the like in the text are special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the range of characters of the text that it stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def token(self, index: int) -> str:
        """The entry of an id."""
        return self.entries[index]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The entries of ids."""
        return [self.entries[index] for index in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text: "##" pieces joined to what stands before them, every token kept, special ones too."""
        words: list[str] = []
        for piece in self.tokens(ids):
            if words and piece.startswith(_PREFIX) and piece != _PREFIX:
                words[-1] += piece[len(_PREFIX) :]
            else:
                words.append(piece)
        return " ".join(words)

    def save(self, folder: Path, *, token_types: bool = True, max_length: int | None = None) -> None:
        """Write vocab.txt, tokenizer.json and tokenizer_config.json, which transformers loads with equal ids.

        `token_types=False` is for models without segment embeddings, whose forward takes no token_type_ids.
        `max_length`: tokens that the model beside it reads, to which `truncation=True` cuts then.
        """
        names = ["input_ids", "token_type_ids", "attention_mask"]
        config: dict[str, Any] = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "model_input_names": names if token_types else [names[0], names[2]],
            **{f"{name.strip('[]').lower()}_token": name for name in SPECIAL_TOKENS},
            **({} if max_length is None else {"model_max_length": max_length}),
        }
        atomic_write(folder / "vocab.txt", "".join(f"{entry}\n" for entry in self.entries))
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True) + "\n")
        write_json(folder / "tokenizer_config.json", config)


def _backend(ids: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_PREFIX)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


def _check_entries(entries: Sequence[str], source: str) -> None:
    missing = [name for name in SPECIAL_TOKENS if name not in set(entries)]
    if missing:
        raise BertlingError(
            f"{source}: a vocabulary must hold the special tokens, but {', '.join(missing)} is not in it;"
            " add each on its own line, or make one with `bertling vocab`"
        )
    first: dict[str, int] = {}
    for line, entry in enumerate(entries, start=1):
        if not entry:
            raise BertlingError(f"{source}: line {line}: empty entry; remove the line")
        if entry in first:
            raise BertlingError(
                f"{source}: line {line}: {entry!r} stands on line {first[entry]} already; each entry may occur once"
            )
        first[entry] = line
    if len(entries) == len(SPECIAL_TOKENS):
        raise BertlingError(f"{source}: it holds the special tokens alone; make a vocabulary with `bertling vocab`")


def _read_entries(path: Path) -> list[str]:
    raw = read_bounded(path, _MOST_BYTES)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BertlingError(f"{path}: line {line}: not UTF-8 text, so no vocabulary; name a vocab.txt") from error
    if not text.strip():
        raise BertlingError(f"{path}: empty: a vocabulary holds one entry per line; make one with `bertling vocab`")
    if "\0" in text:
        raise BertlingError(f"{path}: binary data, not a vocabulary; name a vocab.txt")
    # Only line feeds end an entry: some vocabularies hold other characters that str.splitlines would cut at.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _lowercase_from(path: Path) -> bool:
    config = read_json(path, "tokenizer configuration")
    for name, usual in _USUAL.items():
        if config.get(name) not in (None, *usual):
            raise BertlingError(f"{path}: {name} = {config[name]!r:.60}: only BERT's own tokenizer can be read")
    _check_standard(config, path, "tokenize_chinese_chars")
    return bool(config.get("do_lower_case", True))


def _check_standard(settings: dict[str, Any], path: Path, chinese: str) -> None:
    """Refuse normalisation that is not BERT's: the ids would differ from the model's without a word."""
    lowercase = settings.get("lowercase", settings.get("do_lower_case", True))
    if settings.get("strip_accents") not in (None, lowercase):
        raise BertlingError(f"{path}: strip_accents: {settings['strip_accents']} is not supported; leave it out")
    if not settings.get(chinese, True):
        raise BertlingError(f"{path}: {chinese}: false is not supported; leave it out")


def train_vocabulary(lines: Iterable[str], size: int, *, lowercase: bool = True, min_frequency: int = 2) -> Tokenizer:
    """Make a WordPiece vocabulary of exactly `size` entries, special tokens first ([PAD] [UNK] [CLS] [SEP] [MASK]).

    The lines are read twice (give a list or `text.Lines`): once for the alphabet, once for the words. The same lines
    give the same vocabulary, byte for byte. A piece is made only of pairs seen `min_frequency` times. Names of special
    tokens in the lines, as [UNK] for WikiText's `<unk>`, count for nothing: they have their entries. Nor do words of
    more than 100 characters, which are [UNK] whatever the vocabulary.
    """
    if iter(lines) is lines:
        raise TypeError("lines are read twice: give a list or text.Lines, not an iterator")
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    counted = _count_characters(_countable(lines, normalizer, splitter), normalizer)

    def entries(size: int) -> list[str]:
        alphabet = _alphabet(counted, size)
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            show_progress=False,
            # The library numbers the "##" characters in the order of a randomly seeded hash map and breaks ties between
            # pairs by these numbers. Named up front, in order, they make the result a function of the text.
            special_tokens=[*SPECIAL_TOKENS, *alphabet, *(_PREFIX + char for char in alphabet if _inside_words(char))],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
        )
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizer, splitter
        backend.train_from_iterator(_countable(lines, normalizer, splitter), trainer)
        ids = backend.get_vocab(with_added_tokens=False)
        return sorted(ids, key=ids.__getitem__)

    made = entries(size)
    if len(made) < size:
        most = len(made)
        while (fewer := len(entries(most))) < most:  # a smaller vocabulary spends less on rare characters
            most = fewer
        raise BertlingError(
            f"size: {size} is more than this text can give, which is {most} entries; give {most} or less, or more text"
        )
    return Tokenizer(made, lowercase=lowercase)


def _countable(
    lines: Iterable[str], normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer
) -> Iterator[str]:
    """The lines without the names of special tokens, which the trainer would take apart, and without too long words."""
    for line in lines:
        line = _SPECIAL.sub(" ", line)
        if _may_hold_long_word(line):
            words = splitter.pre_tokenize_str(normalizer.normalize_str(line))
            line = " ".join(word for word, _ in words if len(word) <= _LONGEST)
        yield line


def _may_hold_long_word(line: str) -> bool:
    """Whether somewhere in it more than 100 characters follow each other without a space."""
    start = 0
    while start + _LONGEST < len(line):
        space = line.rfind(" ", start, start + _LONGEST + 1)
        if space < 0:
            return True
        start = space + 1
    return False


def _count_characters(lines: Iterable[str], normalizer: normalizers.Normalizer) -> dict[str, int]:
    raw = np.zeros(0x110000, dtype=np.int64)
    for line in lines:
        np.add.at(raw, np.frombuffer(line.encode("utf-32-le", errors="replace"), dtype=np.uint32), 1)
    counted: dict[str, int] = {}
    for code in np.flatnonzero(raw):
        for char in normalizer.normalize_str(chr(code)):
            if not char.isspace():
                counted[char] = counted.get(char, 0) + int(raw[code])
    return counted


def _alphabet(counted: dict[str, int], size: int) -> list[str]:
    """The characters to spend entries on, in code order: rare ones are left out, of equals the later ones."""
    if not counted:
        raise BertlingError(
            f"vocabulary: there is no text to make it from; give files with words of up to {_LONGEST} characters"
        )
    ranked = sorted(counted, key=lambda char: (-counted[char], char))
    covered = np.cumsum([counted[char] for char in ranked]) / sum(counted.values())
    entries = len(SPECIAL_TOKENS) + np.cumsum([1 + _inside_words(char) for char in ranked])
    wanted, least = (
        min(int(np.searchsorted(covered, share)) + 1, len(ranked)) for share in (_COVERAGE, _LEAST_COVERAGE)
    )
    if entries[least - 1] > size:
        raise BertlingError(
            f"size: {size} is too small for the {len(ranked)} different characters of this text;"
            f" give at least {entries[least - 1]}"
        )
    fitting = int(np.searchsorted(entries, size, side="right"))
    return sorted(ranked[: min(wanted, fitting, max(least, size // _ALPHABET_SHARE))])


def _inside_words(char: str) -> bool:
    """Whether a word can hold the character after another one, so that its "##" form is needed."""
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(f"a{char}a")) == 1


class FastEncoder:
    """The same ids as `Tokenizer.encode`, several times faster on running text: each different word is done once.

    A space, and punctuation wherever it stands, always ends a word for BERT, so what lies between can be looked up.
    """

    _PUNCTUATION = ",.()\"'-;:/"  # the frequent marks; none of them is part of a special token's name

    def __init__(self, tokenizer: Tokenizer, *, cache_size: int = 300_000) -> None:
        """`cache_size` bounds the number of remembered words (about 200 bytes each)."""
        self.tokenizer = tokenizer
        self._cache: dict[str, bytes] = {}
        self._cache_size = cache_size

    def encode(self, text: str) -> bytes:
        """Ids of a text, as the bytes of `Tokenizer.id_type`."""
        text = text.replace("\n", " ")
        for mark in self._PUNCTUATION:
            if mark in text:
                text = text.replace(mark, f" {mark} ")
        words = text.split(" ")
        missing = list(set(filterfalse(self._cache.__contains__, words)))
        if len(self._cache) + len(missing) > self._cache_size:
            self._cache.clear()
            missing = list(set(words))
        kind = self.tokenizer.id_type
        for word, ids in zip(missing, self.tokenizer.encode_batch(missing), strict=True):
            self._cache[word] = np.array(ids, dtype=kind).tobytes()
        encoded = b"".join(map(self._cache.__getitem__, words))
        for word in missing:
            if len(word) > _LONGEST:  # not worth remembering
                del self._cache[word]
        return encoded
