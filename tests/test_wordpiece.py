"""Our tokenizer against a plain one of our own, and against results on record of the original Python code."""

import itertools
import json
import unicodedata
from pathlib import Path

import plain_wordpiece
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bertling.tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets"
ENTRIES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"abcdeghilmnorstuzäéñαβςσжй日本語🙂!$,.?'-_0123",
    *("##" + char for char in "abcdeghilmnorstuzäéñαβςσжй日本語🙂0123"),
    *("the", "##ing", "##ed", "un", "##able", "str", "##ass", "##e", "zu", "##rich", "Z", "##H", "café", "cafe"),
]
ENTRIES = list(dict.fromkeys(ENTRIES))
SMALL = Tokenizer(ENTRIES)
CASED = Tokenizer(ENTRIES, lowercase=False)
# Newer versions of Unicode classify a few characters anew; the library and this Python need not have the same one.
SETTLED = st.characters(
    exclude_categories=("Cs", "Cn", "Co"),
    max_codepoint=0x1F64F,
)
PIECES = st.one_of(
    st.text(SETTLED, max_size=6),
    st.text("abcdeghilmnorstuzäéñ", min_size=1, max_size=8),
    st.sampled_from(
        "[MASK] [UNK] [mask] ##ing the café cafe\u0301 ZÜRICH straße 日本語 \u200d \ufeff 🙂 👩\u200d🚀 İ ΑΣ".split(" ")
    ),
    st.sampled_from(" \t\n\r\u00a0\u3000\u2028\0\ufffd\u00ad\u0301"),
    st.integers(95, 105).map(lambda count: "a" * count),
)


@given(st.lists(PIECES, max_size=12).map("".join))
@example("")
@example("[CLS][SEP] [MASK]ed un[MASK]able")
@example("a" * 100 + " " + "a" * 101)
@example("e\u0301\u0302\u0303 \u0301 x\u0301")
@example("don't $5 a_b -- ...")
def test_ids_and_offsets_are_those_of_the_plain_tokenizer(text: str) -> None:
    for tokenizer, lowercase in ((SMALL, True), (CASED, False)):
        expected = plain_wordpiece.encode(text, tokenizer.ids, lowercase=lowercase)
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert tokenizer.tokens(ids) == tokenizer.tokens(expected[0])
        assert offsets == expected[1]
        assert tokenizer.encode(text) == ids


def test_results_on_record_of_the_original_python_code() -> None:
    """tests/assets/wordpiece.json: BertTokenizer of transformers 4.57 without its fast library, on awkward texts."""
    record = json.loads((ASSETS / "wordpiece.json").read_text())
    tokenizers = {True: Tokenizer(record["entries"]), False: Tokenizer(record["entries"], lowercase=False)}
    assert len(record["texts"]) >= 40
    for case in record["texts"]:
        text = unicodedata.normalize("NFC", case["text"])  # as that code does first, and the fast library does not
        for lowercase, name in ((True, "uncased"), (False, "cased")):
            tokenizer = tokenizers[lowercase]
            assert tokenizer.tokens(tokenizer.encode(text)) == case[name], ascii(text)


@pytest.mark.parametrize("text", ["unable tried the being", "don't re-read it, zürich's end"])
def test_whole_words_by_prefix_are_those_by_offsets(text: str) -> None:
    """Pieces that go on with a word, and no others, touch the one before within a word of the splitting."""
    ids, offsets = SMALL.encode_with_offsets(text)
    word_of = {}
    for number, word in enumerate(plain_wordpiece.words([(char, i) for i, char in enumerate(text)])):
        word_of.update({index: number for _, index in word})
    same = [word_of[a] == word_of[b] for (a, _), (b, _) in itertools.pairwise(offsets)]
    assert same == [SMALL.continues[index] for index in ids[1:]]
