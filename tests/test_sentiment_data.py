"""The labelled sentences in the box: enough, balanced, varied, clean, and a dev set that is not in the training set."""

import re
from collections import Counter
from importlib.resources import files

import pytest

MINIMUM = {"train": 440, "dev": 170}


def read(split: str) -> list[tuple[str, str]]:
    text = (files("bertling") / "assets" / f"sentiment_{split}.tsv").read_text(encoding="utf-8")
    header, *lines = text.removesuffix("\n").split("\n")
    assert header == "sentence\tlabel"
    rows = [line.split("\t") for line in lines]
    assert all(len(row) == 2 for row in rows)
    return [(row[0], row[1]) for row in rows]


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", sentence.lower())


@pytest.mark.parametrize("split", sorted(MINIMUM))
def test_enough_rows_of_both_classes(split: str) -> None:
    labels = Counter(label for _, label in read(split))
    total = sum(labels.values())
    assert set(labels) == {"negative", "positive"}
    assert total >= MINIMUM[split]
    assert 0.48 <= labels["positive"] / total <= 0.52


@pytest.mark.parametrize("split", sorted(MINIMUM))
def test_rows_are_short_plain_sentences(split: str) -> None:
    for sentence, _ in read(split):
        assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,.?'-]*[.?]", sentence), sentence
        assert "  " not in sentence, sentence
        assert 4 <= len(words(sentence)) <= 20, sentence


def test_openings_are_varied() -> None:
    openings = Counter(tuple(words(sentence)[:4]) for split in MINIMUM for sentence, _ in read(split))
    opening, count = openings.most_common(1)[0]
    assert count <= 3, opening


def test_no_duplicates_within_a_file() -> None:
    for split in MINIMUM:
        seen = Counter(" ".join(words(sentence)) for sentence, _ in read(split))
        assert max(seen.values()) == 1, seen.most_common(1)


def test_no_dev_sentence_is_nearly_in_train() -> None:
    train = [(set(words(sentence)), sentence) for sentence, _ in read("train")]
    for sentence, _ in read("dev"):
        mine = set(words(sentence))
        similarity, other = max((len(mine & theirs) / len(mine | theirs), text) for theirs, text in train)
        assert similarity < 0.6, (sentence, other)


def test_most_dev_words_are_seen_in_train() -> None:
    known = {word for sentence, _ in read("train") for word in words(sentence)}
    dev = [word for sentence, _ in read("dev") for word in words(sentence)]
    assert sum(word in known for word in dev) / len(dev) > 0.8
