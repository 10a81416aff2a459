"""BERT's tokenizer once more, in plain Python, from its description (Devlin et al. 2019 and the notes of their code).

Slow, short, and independent of the library that bertling uses: what both agree on is right twice.
"""

import unicodedata
from collections.abc import Iterator, Mapping

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100
Char = tuple[str, int]
"""A character after normalisation, and the index of the one that it came from."""


def encode(text: str, ids: Mapping[str, int], *, lowercase: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and for each the range of characters of the text that it stands for."""
    found: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, stop, special in sections(text):
        if special:
            found.append(ids[text[start:stop]])
            offsets.append((start, stop))
            continue
        chars = normalise([(text[i], i) for i in range(start, stop)], lowercase=lowercase)
        for word in words(chars):
            for index, first, last in pieces(word, ids):
                found.append(index)
                offsets.append((word[first][1], word[last - 1][1] + 1))
    return found, offsets


def sections(text: str) -> Iterator[tuple[int, int, bool]]:
    """The text cut at special tokens, which are taken as they are."""
    start = at = 0
    while at < len(text):
        name = next((name for name in SPECIAL if text.startswith(name, at)), None)
        if name is None:
            at += 1
            continue
        if start < at:
            yield start, at, False
        yield at, at + len(name), True
        start = at = at + len(name)
    if start < len(text):
        yield start, len(text), False


def normalise(chars: list[Char], *, lowercase: bool) -> list[Char]:
    """Control characters out, white space to blanks, blanks around CJK; accents and capitals away if asked for."""
    result: list[Char] = []
    for char, index in chars:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            result.append((" ", index))
        elif char in "\0\ufffd" or category.startswith("C"):
            continue
        elif is_cjk(char):
            result += [(" ", index), (char, index), (" ", index)]
        else:
            result.append((char, index))
    if not lowercase:
        return result
    apart = [(part, index) for char, index in result for part in unicodedata.normalize("NFD", char)]
    kept = [(char, index) for char, index in apart if unicodedata.category(char) != "Mn"]
    return [(small, index) for char, index in kept for small in char.lower()]


def is_cjk(char: str) -> bool:
    """The blocks of CJK ideographs that the authors name (Hangul and the kana are not among them)."""
    blocks = (
        *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
        *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
    )
    return any(first <= ord(char) <= last for first, last in blocks)


def words(chars: list[Char]) -> Iterator[list[Char]]:
    """Split at white space, and around each character of punctuation."""
    word: list[Char] = []
    for char, index in chars:
        blank, alone = char.isspace(), is_punctuation(char)
        if (blank or alone) and word:
            yield word
            word = []
        if alone:
            yield [(char, index)]
        elif not blank:
            word.append((char, index))
    if word:
        yield word


def is_punctuation(char: str) -> bool:
    """Unicode's, and every sign of ASCII that is neither letter nor digit, $ and ^ among them."""
    return unicodedata.category(char).startswith("P") or (33 <= ord(char) <= 126 and not char.isalnum())


def pieces(word: list[Char], ids: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """The longest entry that fits, then the longest that goes on, and so on; [UNK] where none fits."""
    text = "".join(char for char, _ in word)
    found: list[tuple[int, int, int]] = []
    start = 0
    while start < len(text) <= LONGEST_WORD:
        prefix = "##" if start else ""
        stop = next((stop for stop in range(len(text), start, -1) if prefix + text[start:stop] in ids), None)
        if stop is None:
            break
        found.append((ids[prefix + text[start:stop]], start, stop))
        start = stop
    return found if start == len(text) else [(ids["[UNK]"], 0, len(text))]
