"""The vocabulary: loading, saving for transformers, training, and every refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertling.files import BertlingError
from bertling.text import Lines
from bertling.tokenizer import SPECIAL_TOKENS, FastEncoder, Tokenizer, train_vocabulary

ASSETS = Path(__file__).parent / "assets"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "vocab"
HARD_TEXTS = [
    "H\xe9llo, w\xf6rld! \u4e2d\u6587\u5b57 don't e-mail [MASK] x[MASK]. \u0130stanbul \u0149 \uff21\uff22",
    "paris is the [MASK] of [UNK] . [SEP][CLS] [PAD]",
    "na\xefve\tcaf\xe9\u200b a\u0301b \u2028 x\x1cy\x85z \x00\ufffd",
    "a" * 150 + " 3.14,(2) \"q\" 'r' well-known: a/b; `c` {d} [e] ...",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ASSETS / "vocab")


def write_vocabulary(path: Path, entries: list[str]) -> Path:
    path.write_bytes("".join(f"{entry}\n" for entry in entries).encode())
    return path


@pytest.mark.parametrize("name", ["bert-base-uncased.vocab.txt", "seed-24992.vocab.txt"])
def test_known_vocabularies_load_with_special_tokens_by_name(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the vocabulary is not on this machine")
    tokenizer = Tokenizer.load(path)
    expected = {
        "bert-base-uncased.vocab.txt": (30522, (0, 100, 101, 102, 103)),
        "seed-24992.vocab.txt": (24992, (0, 4, 1, 2, 3)),
    }
    assert (tokenizer.vocab_size, tokenizer.special_ids) == expected[name]
    assert tokenizer.tokens(tokenizer.special_ids) == list(SPECIAL_TOKENS)


def test_special_tokens_in_text_are_recognised_and_ids_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The [MASK] heron [UNK]")
    assert ids[1] == tokenizer.mask_id
    assert ids[-1] == tokenizer.unk_id
    assert tokenizer.decode(ids) == "the [MASK] heron [UNK]"
    assert any(piece.startswith("##") for piece in tokenizer.tokens(tokenizer.encode("thunderstorm")))
    assert tokenizer.decode(tokenizer.encode("thunderstorm")) == "thunderstorm"
    assert tokenizer.encode_batch(["the heron", ""]) == [tokenizer.encode("the heron"), []]
    assert tokenizer.token(tokenizer.cls_id) == "[CLS]"


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_transformers_loads_what_is_saved_with_equal_ids(tmp_path: Path, lowercase: bool, order: int) -> None:
    transformers = pytest.importorskip("transformers")
    entries = Tokenizer.load(ASSETS / "vocab").entries + ("\xe9", "\u4e2d", "A", "##B", "\u0130")
    ours = Tokenizer(entries[::order], lowercase=lowercase)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    pair = theirs("the sea", "a kite")
    assert pair["input_ids"][0] == ours.cls_id
    assert pair["input_ids"].count(ours.sep_id) == 2
    assert pair["token_type_ids"][-1] == 1
    assert (theirs.mask_token_id, theirs.pad_token_id) == (ours.mask_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size
    theirs.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "vocab.txt", tmp_path / "again"):
        assert Tokenizer.load(folder).fingerprint == ours.fingerprint


def test_models_without_segments_get_no_token_type_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, token_types=False)
    assert set(transformers.AutoTokenizer.from_pretrained(tmp_path)("a kite")) == {"input_ids", "attention_mask"}


def test_the_case_is_found_without_a_configuration(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cased = Tokenizer(tokenizer.entries, lowercase=False)
    cased.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).fingerprint == cased.fingerprint


def test_fingerprint_tells_order_and_case_apart(tokenizer: Tokenizer) -> None:
    others = [Tokenizer(tokenizer.entries[::-1]), Tokenizer(tokenizer.entries, lowercase=False)]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_windows_line_ends_change_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(tokenizer.entries).encode("utf-8-sig"))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("cache_size", [3, 1000])
def test_fast_encoder_gives_the_same_ids(tokenizer: Tokenizer, cache_size: int) -> None:
    encoder = FastEncoder(tokenizer, cache_size=cache_size)
    texts = [*HARD_TEXTS, (ASSETS / "tiny.txt").read_text(), "\n\n a\nb \r\n c\td"]
    for text in texts * 2:
        assert np.frombuffer(encoder.encode(text), tokenizer.id_type).tolist() == tokenizer.encode(text)


def test_fast_encoder_forgets_endless_words(tokenizer: Tokenizer) -> None:
    encoder = FastEncoder(tokenizer)
    encoder.encode("kite " + "x" * 5000)
    assert set(encoder._cache) == {"kite"}


def test_large_vocabularies_take_four_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.id_type == np.dtype("<u2")
    big = Tokenizer([*SPECIAL_TOKENS, *(f"w{number}" for number in range(65_531))])
    assert big.id_type == np.dtype("<u4")
    assert np.frombuffer(FastEncoder(big).encode("w65530"), big.id_type).tolist() == [65_535]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty: a vocabulary holds one entry per line"),
        (b" \n\n", "empty: a vocabulary holds"),
        (b"the\nof\n", r"must hold the special tokens, but \[PAD\], \[UNK\], .* is not in it"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nof\nthe\n", "line 8: 'the' stands on line 6 already"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\nof\n", "line 6: empty entry"),
        (b"[PAD]\n\x80\x81\n", "line 2: not UTF-8 text, so no vocabulary"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "holds the special tokens alone; make a vocabulary"),
        (b"[PAD]\n\x00\x01\n", "binary data, not a vocabulary"),
    ],
)
def test_unusable_vocabulary_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    for name in (path, tmp_path):
        with pytest.raises(BertlingError, match=message) as caught:
            Tokenizer.load(name)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match="no such file"):
        Tokenizer.load(tmp_path / "vocab.txt")
    with pytest.raises(BertlingError, match=r"no vocab\.txt in this folder \(it holds nothing\)"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"strip_accents": False}, "strip_accents: False is not supported"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars: false is not supported"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class = 'BertJapaneseTokenizer': only BERT's own"),
        ({"word_tokenizer_type": "mecab"}, "word_tokenizer_type = 'mecab': only BERT's own"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize = False: only BERT's own"),
    ],
)
def test_normalisation_other_than_bert_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, config: dict[str, Any], message: str
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BertlingError, match=message):
        Tokenizer.load(tmp_path)


def test_tokenizer_json_of_another_kind_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    path = tmp_path / "tokenizer.json"
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    good = json.loads(path.read_text())
    for change, message in [
        ({"model": {"type": "BPE", "vocab": {}}}, "not a WordPiece tokenizer"),
        ({"normalizer": {"type": "NFC"}}, "not normalised as BERT's"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 7}}}, "its ids are not 0 to"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(BertlingError, match=message):
            Tokenizer.load(tmp_path)


def test_training_gives_the_stored_vocabulary_in_any_process(tokenizer: Tokenizer) -> None:
    code = (
        "from pathlib import Path; from bertling.text import Lines; from bertling.tokenizer import train_vocabulary;"
        f"print(train_vocabulary(Lines([Path({str(ASSETS / 'tiny.txt')!r})]), 400).fingerprint)"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == tokenizer.fingerprint


def test_training_keeps_size_order_and_case() -> None:
    lines = Lines([ASSETS / "tiny.txt"])
    trained = train_vocabulary(lines, 300)
    assert trained.vocab_size == 300
    assert trained.special_ids == (0, 1, 2, 3, 4)
    assert "the" in trained.ids
    assert not any(entry != entry.lower() for entry in trained.entries[5:])
    cased = train_vocabulary(lines, 300, lowercase=False)
    assert "The" in cased.ids
    assert not cased.lowercase


def test_rare_characters_get_no_entry() -> None:
    trained = train_vocabulary(["the heron and the kite"] * 1000 + ["\u0416"], 30)
    assert "\u0436" not in trained.ids
    assert trained.tokens(trained.encode("the \u0416")) == ["the", "[UNK]"]


def test_unknown_words_of_wikitext_give_no_entry(tmp_path: Path) -> None:
    text = " = Kites = \n the <unk> flew to <unk>\n the kite and <unk> - <unk>\n"
    (tmp_path / "with.txt").write_text(text * 20)
    (tmp_path / "without.txt").write_text(text.replace("<unk>", "") * 20)
    trained, other = (train_vocabulary(Lines([tmp_path / name]), 42) for name in ("with.txt", "without.txt"))
    assert trained.entries == other.entries
    assert not {"unk", "[", "]"} & trained.ids.keys()


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (
            ["the heron"] * 9,
            5000,
            r"size: 5000 is more than this text can give, which is \d+ entries; give \d+ or less",
        ),
        (["the heron"] * 9, 16, r"size: 16 is too small for the 6 different characters of this text; give at least 17"),
        (["abcdefgh"] * 9, 0, "size: 0 is too small for the 8 .* give at least 21"),
        (["", " "], 100, "there is no text to make it from"),
        ([], 100, "there is no text to make it from"),
    ],
)
def test_impossible_training_is_refused(lines: list[str], size: int, message: str) -> None:
    with pytest.raises(BertlingError, match=message):
        train_vocabulary(lines, size)


def test_the_size_that_an_error_names_works() -> None:
    many = [chr(0x4E00 + (7 * i + 13 * j * j) % (40 + i)) for i in range(600) for j in range(20)]
    characters = ["".join(many[i : i + 20]) for i in range(0, len(many), 20)]
    for lines in (["the heron"] * 9, ["ab"] * 9, ["!?"] * 9, ["abcdefghijklmnopqrstuvwxyz0123456789"] * 9, characters):
        for size, named in ((4, "give at least "), (9000, "give ")):
            with pytest.raises(BertlingError, match=f"^size: {size} is ") as refused:
                train_vocabulary(lines, size)
            works = int(str(refused.value).split(named)[1].split()[0])
            if named == "give at least ":
                with pytest.raises(BertlingError, match="is too small"):
                    train_vocabulary(lines, works - 1)
            else:
                assert train_vocabulary(lines, works).vocab_size == works


def test_one_shot_lines_are_refused() -> None:
    with pytest.raises(TypeError, match="lines are read twice"):
        train_vocabulary(iter(["the"]), 100)
