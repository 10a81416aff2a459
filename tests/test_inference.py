"""Answers do not depend on what else is in the batch, masks are answered in order, and texts come in from anywhere."""

import gzip
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import bertling

from bertling import inference
from bertling.checkpoint import write_model
from bertling.files import BertlingError
from bertling.inference import (
    MAX_LINE_BYTES,
    Bertling,
    Classified,
    Classifier,
    Embedder,
    Filled,
    FillMask,
    Pooling,
    iter_texts,
    load,
)
from bertling.model import BertForMaskedLM, BertForSequenceClassification, ModelConfig
from bertling.presets import preset_config
from bertling.runtime import Runtime, multiplies_int8
from bertling.tokenizer import Tokenizer
from bertling.vectors import Vectors

WORDS = [f"word{i}" for i in range(40)]
TOKENIZER = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
LIMIT = 24
Model = TypeVar("Model", BertForMaskedLM, BertForSequenceClassification)
BF16 = Runtime(torch.device("cpu"), torch.bfloat16, compile=False)


def make_config(preset: str = "bert") -> ModelConfig:
    return preset_config(
        preset,
        "mini",
        TOKENIZER.vocab_size,
        max_position_embeddings=LIMIT,
        pad_token_id=TOKENIZER.pad_id,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        labels=["bad", "so-so", "good"],
    )


def make_model(kind: type[Model], preset: str = "bert") -> Model:
    generator = torch.Generator().manual_seed(0)
    model = kind(make_config(preset), generator)
    with torch.no_grad():  # far from zero, so that answers differ clearly and every part counts
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_texts(count: int) -> list[str]:
    """Texts of 1 to 20 words."""
    return [" ".join(WORDS[(i * 7 + j * j) % 40] for j in range(1 + i * 13 % 20)) for i in range(count)]


@pytest.fixture(params=["bert", "modern", "seed", "distilbert"])
def classifier(request: pytest.FixtureRequest) -> Classifier:
    return Classifier(make_model(BertForSequenceClassification, request.param), TOKENIZER)


@pytest.fixture
def fill_mask() -> FillMask:
    return FillMask(make_model(BertForMaskedLM), TOKENIZER)


def test_classes_are_the_same_singly_and_in_batches(classifier: Classifier) -> None:
    texts = [*make_texts(70), ""]
    together = classifier.classify(texts)
    assert [answer["text"] for answer in together] == texts
    for i in (0, 1, 33, 69, 70):
        alone = classifier.classify(texts[i])[0]
        assert alone["label"] == together[i]["label"]
        assert alone["probabilities"] == pytest.approx(together[i]["probabilities"], abs=1e-5)
    assert len({round(answer["score"], 4) for answer in together}) > 10
    for answer in together:
        assert list(answer["probabilities"]) == ["bad", "so-so", "good"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["score"] == answer["probabilities"][answer["label"]] == max(answer["probabilities"].values())
        assert not answer["truncated"]
    assert classifier.classify([]) == []


def test_classes_are_those_of_the_plain_model(classifier: Classifier) -> None:
    text = "word3 word9 word27"
    ids = torch.tensor([[TOKENIZER.cls_id, *TOKENIZER.encode(text), TOKENIZER.sep_id]])
    with torch.no_grad():
        expected = classifier.model(ids).softmax(-1)[0].tolist()
    assert list(classifier.classify(text)[0]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def test_long_texts_are_cut_and_it_is_said(classifier: Classifier) -> None:
    words = [WORDS[i % 40] for i in range(100)]
    whole, beginning = classifier.classify([" ".join(words), " ".join(words[: LIMIT - 2])])
    assert whole["truncated"]
    assert not beginning["truncated"]
    assert whole["probabilities"] == pytest.approx(beginning["probabilities"], abs=1e-5)


def test_autocast_is_applied() -> None:
    text = make_texts(9)
    exact = Classifier(make_model(BertForSequenceClassification), TOKENIZER).classify(text)
    coarse = Classifier(make_model(BertForSequenceClassification), TOKENIZER, BF16).classify(text)
    for a, b in zip(exact, coarse, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=0.2)
    assert any(a["score"] != b["score"] for a, b in zip(exact, coarse, strict=True))


def test_every_mask_gets_its_own_ranked_list(fill_mask: FillMask) -> None:
    text = "word1 [MASK] word2 word3 [MASK] word4"
    ids = torch.tensor([[TOKENIZER.cls_id, *TOKENIZER.encode(text), TOKENIZER.sep_id]])
    with torch.no_grad():
        expected = fill_mask.model(ids)[0].softmax(-1)
    answer = fill_mask.fill(text, top_k=7)[0]
    assert len(answer["masks"]) == 2
    for place, ranked in zip((2, 5), answer["masks"], strict=True):
        values, entries = expected[place].topk(7)
        assert [token for token, _ in ranked] == TOKENIZER.tokens(entries.tolist())
        assert [value for _, value in ranked] == pytest.approx(values.tolist(), abs=1e-5)
    assert answer["masks"][0] != answer["masks"][1]
    assert len(fill_mask.fill(text, top_k=TOKENIZER.vocab_size)[0]["masks"][0]) == TOKENIZER.vocab_size


def test_masks_are_the_same_singly_and_in_batches(fill_mask: FillMask) -> None:
    texts = [f"{text} [MASK] word5" + " [MASK]" * (i % 3 % 2) for i, text in enumerate(make_texts(70))]
    together = fill_mask.fill(iter(texts))
    assert [answer["text"] for answer in together] == texts
    for i in (0, 1, 35, 69):
        alone = fill_mask.fill(texts[i])[0]
        assert len(alone["masks"]) == len(together[i]["masks"]) == texts[i].count("[MASK]")
        for a, b in zip(alone["masks"], together[i]["masks"], strict=True):
            assert [token for token, _ in a] == [token for token, _ in b]
            assert [value for _, value in a] == pytest.approx([value for _, value in b], abs=1e-5)


@pytest.mark.parametrize("place", [0, 3, 50, 88, 99])
def test_the_part_around_the_masks_of_a_long_text_is_read(fill_mask: FillMask, place: int) -> None:
    words = [WORDS[i % 40] for i in range(100)]
    words[place] = "[MASK]"
    answer = fill_mask.fill(" ".join(words))[0]
    assert answer["truncated"]
    assert len(answer["masks"]) == 1
    start = min(max(0, place - 10), 78)
    near = fill_mask.fill(" ".join(words[start : start + LIMIT - 2]))[0]
    assert not near["truncated"]
    assert [value for _, value in answer["masks"][0]] == pytest.approx([v for _, v in near["masks"][0]], abs=1e-3)


@pytest.mark.parametrize("first", [0, 40, 78])
def test_masks_as_far_apart_as_can_be(fill_mask: FillMask, first: int) -> None:
    words = ["word1"] * 100
    words[first] = words[first + LIMIT - 3] = "[MASK]"
    assert len(fill_mask.fill(" ".join(words))[0]["masks"]) == 2


def test_masks_further_apart_than_the_model_reads_are_answered_each_where_it_stands(fill_mask: FillMask) -> None:
    words = [WORDS[i % 40] for i in range(100)]
    places = [0, LIMIT - 3, LIMIT, 60, 61, 99]
    for place in places:
        words[place] = "[MASK]"
    answer = fill_mask.fill([" ".join(words), "word1 [MASK]"])[0]
    assert answer["truncated"]
    assert len(answer["masks"]) == len(places)
    # Windows of 22: the first two masks, the third (which sees the second too), those in the middle, the last one.
    for of_window, start in ((slice(0, 2), 0), (slice(2, 3), LIMIT - 10), (slice(3, 5), 50), (slice(5, 6), 78)):
        alone = fill_mask.fill(" ".join(words[start : start + LIMIT - 2]))[0]["masks"]
        for whole, part in zip(answer["masks"][of_window], alone[-len(answer["masks"][of_window]) :], strict=True):
            assert [value for _, value in whole] == pytest.approx([value for _, value in part], abs=1e-5)


def test_texts_that_are_none_are_named(fill_mask: FillMask) -> None:
    for text, kind in ((None, "NoneType"), (float("nan"), "float"), (b"[MASK]", "bytes")):
        with pytest.raises(BertlingError, match=f"is of type {kind}; give strings"):
            fill_mask.fill(["word1 [MASK]", text])  # type: ignore[list-item]


def test_what_fill_refuses(fill_mask: FillMask) -> None:
    for text in ("", "word1 word2", "word1 [mask]"):
        with pytest.raises(BertlingError, match=r"has no \[MASK\]; write \[MASK\] where a word is to be found"):
            fill_mask.fill(["word1 [MASK]", text])
    for top_k in (0, TOKENIZER.vocab_size + 1):
        with pytest.raises(BertlingError, match=rf"top-k {top_k}: must lie between 1 and the vocabulary's 45"):
            fill_mask.fill("[MASK]", top_k)
    with pytest.raises(BertlingError, match="character 1 of the text is no Unicode"):
        fill_mask.fill("\udce9 [MASK]")
    assert fill_mask.fill([]) == []


def test_rows_beyond_the_vocabulary_are_no_answers() -> None:
    shorter = Tokenizer(TOKENIZER.entries[:20])
    ranked = FillMask(make_model(BertForMaskedLM), shorter).fill("word1 [MASK]", top_k=20)[0]["masks"][0]
    assert sorted(token for token, _ in ranked) == sorted(shorter.entries)
    assert sum(value for _, value in ranked) == pytest.approx(1)


def test_bertling_uses_the_head_that_is_there() -> None:
    masked = Bertling(make_model(BertForMaskedLM), TOKENIZER)
    assert masked.config.vocab_size == TOKENIZER.vocab_size
    assert not masked.model.training
    assert masked.fill("word1 [MASK]", top_k=3)[0]["masks"][0][0][1] > 0
    with pytest.raises(BertlingError, match="classify: this model has no classification head; fine-tune it"):
        masked.classify("word1")
    classifier = Bertling(make_model(BertForSequenceClassification), TOKENIZER)
    assert classifier.classify("word1")[0]["label"] in ("bad", "so-so", "good")
    with pytest.raises(BertlingError, match="fill: this model has no head for masked words"):
        classifier.fill("[MASK]")


def test_texts_from_arguments_file_and_standard_input(tmp_path: Path) -> None:
    raw = "\ufeffeins\r\n\nzwei\u2028drei".encode()
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(raw)
    packed.write_bytes(gzip.compress(raw))
    expected = [["eins", "", "zwei\u2028drei"]]
    assert list(iter_texts([], plain)) == expected
    assert list(iter_texts([], packed)) == expected
    assert list(iter_texts([], stdin=io.BytesIO(raw))) == expected
    assert list(iter_texts(["a", "b"])) == [["a", "b"]]


def test_a_long_file_comes_in_chunks() -> None:
    chunks = list(iter_texts([], stdin=io.BytesIO(b"text\n" * 2500)))
    assert [len(chunk) for chunk in chunks] == [1024, 1024, 452]
    long_lines = iter_texts([], stdin=io.BytesIO((b"x" * (MAX_LINE_BYTES // 2) + b"\n") * 5))
    assert max(sum(map(len, chunk)) for chunk in long_lines) <= 2 * MAX_LINE_BYTES


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


def test_what_iter_texts_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(BertlingError, match=r"a\.txt: line 2: byte 0xe9 is not UTF-8"):
        list(iter_texts([], path))
    with pytest.raises(BertlingError, match=r"--input .*a\.txt: texts were given as arguments too"):
        list(iter_texts(["text"], path))
    path.write_bytes("wide".encode("utf-16"))
    with pytest.raises(BertlingError, match="line 1: a zero byte: this is a binary file or UTF-16"):
        list(iter_texts([], path))
    path.write_bytes(b"")
    with pytest.raises(BertlingError, match=r"a\.txt: is empty; give one text a line"):
        list(iter_texts([], path))
    with pytest.raises(BertlingError, match="standard input: is empty"):
        list(iter_texts([], stdin=io.BytesIO()))
    with pytest.raises(BertlingError, match="standard input: line 2: longer than 1,048,576 bytes"):
        list(iter_texts([], stdin=io.BytesIO(b"a\n" + b"x" * (MAX_LINE_BYTES + 1))))
    with pytest.raises(BertlingError, match="no text: give texts as arguments, with --input FILE"):
        list(iter_texts([], stdin=Terminal(b"")))
    with pytest.raises(BertlingError, match=r"none\.txt: no such file"):
        list(iter_texts([], tmp_path / "none.txt"))
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(BertlingError, match=r"bad\.gz: is not a complete gzip file"):
        list(iter_texts([], tmp_path / "bad.gz"))


def test_load_reads_what_a_checkpoint_holds(tmp_path: Path) -> None:
    model = make_model(BertForSequenceClassification)
    write_model(tmp_path, model, TOKENIZER)
    texts = make_texts(5)
    loaded = load(str(tmp_path), Runtime(torch.device("cpu"), torch.float32, compile=False))
    expected = Classifier(model, TOKENIZER).classify(texts)
    assert [a["label"] for a in loaded.classify(texts)] == [a["label"] for a in expected]
    assert [a["score"] for a in loaded.classify(texts)] == pytest.approx([a["score"] for a in expected], abs=1e-5)
    with pytest.raises(BertlingError, match="no such folder"):
        load(tmp_path / "none")


@pytest.mark.parametrize("preset", ["bert", "modern", "seed", "distilbert"])
def test_in_bf16_all_weights_are_and_the_answers_near(preset: str, tmp_path: Path) -> None:
    model = make_model(BertForSequenceClassification, preset)
    write_model(tmp_path, model, TOKENIZER)
    texts = make_texts(9)
    loaded = load(tmp_path, BF16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    expected = Classifier(model, TOKENIZER).classify(texts)
    assert [a["score"] for a in loaded.classify(texts)] == pytest.approx([a["score"] for a in expected], abs=0.01)


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no dot products of int8 (VNNI)")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("preset", ["bert", "modern", "seed", "distilbert"])
def test_in_int8_answers_are_near_in_many_batches_too(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(BertForSequenceClassification, preset)
    write_model(tmp_path, model, TOKENIZER)
    texts = make_texts(40)
    loaded = load(tmp_path, Runtime(torch.device("cpu"), torch.float32, compile=False, int8=True))
    expected = [a["score"] for a in Classifier(model, TOKENIZER).classify(texts)]
    together = [a["score"] for a in loaded.classify(texts)]
    assert together == pytest.approx(expected, abs=0.03)
    assert together != pytest.approx(expected, abs=1e-7)
    monkeypatch.setattr(inference, "BATCH_TOKENS", 60)  # threads take batches of their own
    assert [a["score"] for a in loaded.classify(texts)] == pytest.approx(together, abs=0.03)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_many_batches_are_shared_out_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(make_model(BertForSequenceClassification), TOKENIZER)
    filler = FillMask(make_model(BertForMaskedLM), TOKENIZER)
    embedder = Embedder(make_model(BertForMaskedLM), TOKENIZER)
    texts = make_texts(40)
    masked = [f"{text} [MASK]" for text in make_texts(40)]

    def answers() -> tuple[list[Classified], list[Filled], Vectors]:
        return classifier.classify(texts), filler.fill(masked), embedder.embed(texts)

    one_by_one = answers()
    seen = set()
    monkeypatch.setattr(inference, "BATCH_TOKENS", 64)
    classifier.model.register_forward_hook(lambda *_: seen.add((threading.get_ident(), torch.get_num_threads())))
    classes, filled, vectors = answers()
    assert {threads for _, threads in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert torch.get_num_threads() == 2
    assert [a["label"] for a in classes] == [a["label"] for a in one_by_one[0]]
    assert [a["masks"][0][0][0] for a in filled] == [a["masks"][0][0][0] for a in one_by_one[1]]
    assert vectors == pytest.approx(one_by_one[2], abs=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_what_fails_in_a_thread_is_said_and_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(make_model(BertForSequenceClassification), TOKENIZER)
    monkeypatch.setattr(inference, "BATCH_TOKENS", 64)
    classifier.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        classifier.classify(make_texts(40))
    assert torch.get_num_threads() == 2


def by_hand(model: BertForMaskedLM, ids: list[int], pooling: str) -> torch.Tensor:
    """One text alone, without padding, as sentence-transformers pools: the mean over its tokens, or the first."""
    with torch.inference_mode():
        hidden = model.encode(torch.tensor([ids]))[0]
    return hidden.mean(dim=0) if pooling == "mean" else hidden[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("preset", ["bert", "modern", "seed", "distilbert"])
def test_vectors_are_those_of_each_text_alone(preset: str, pooling: Pooling) -> None:
    model, texts = make_model(BertForMaskedLM, preset), make_texts(50)
    embedder = Embedder(model, TOKENIZER)
    plain, unit = (embedder.embed(texts, pooling, normalize=normalize) for normalize in (False, True))
    assert plain.shape == (50, 32)
    for text, vector, short in zip(texts, plain, unit, strict=True):
        ids = [TOKENIZER.cls_id, *TOKENIZER.encode(text)[: LIMIT - 2], TOKENIZER.sep_id]
        expected = by_hand(model, ids, pooling)
        assert torch.allclose(torch.from_numpy(vector), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(torch.from_numpy(short), expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert embedder.embed("word1").shape == (1, 32)
    assert embedder.embed([]).shape == (0, 32)


def test_any_head_embeds_and_an_unknown_pooling_is_refused() -> None:
    model = Bertling(make_model(BertForSequenceClassification), TOKENIZER)
    assert model.embed(["word1", "word2"]).shape == (2, 32)
    with pytest.raises(BertlingError, match="pooling = 'max': must be cls or mean"):
        model.embed("word1", "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", [".npy", ".parquet", ".jsonl"])
def test_embed_writes_what_the_model_says(ending: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", make_model(BertForMaskedLM), TOKENIZER)
    texts = make_texts(1500)
    (tmp_path / "texts.txt").write_text("".join(text + "\n" for text in texts))
    out = tmp_path / f"vectors{ending}"
    words = ["embed", "--cp", tmp_path / "model", "--input", tmp_path / "texts.txt", "-o", out, "--device", "cpu"]
    assert bertling(*words, "--json").answer["texts"] == 1500
    if ending == ".npy":
        vectors = np.load(out)
        assert vectors.dtype == np.float32
    elif ending == ".parquet":
        table = pq.read_table(out)
        assert table["text"].to_pylist() == texts
        vectors = np.array(table["vector"].to_pylist())
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in rows] == texts
        vectors = np.array([row["vector"] for row in rows])
    np.testing.assert_allclose(vectors, load(tmp_path / "model").embed(texts), atol=1e-5)
    assert "--force" in bertling(*words).error
    assert [path.name for path in tmp_path.glob(".vectors*")] == []


def test_embed_answers_in_json_lines(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", make_model(BertForMaskedLM), TOKENIZER)
    ended = bertling("embed", "--cp", tmp_path / "model", "--pooling", "cls", "word1", "word2 word3")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["text"] for row in rows] == ["word1", "word2 word3"]
    assert all(len(row["vector"]) == 32 for row in rows)
    assert (
        "must end in one of .npy, .parquet, .jsonl"
        in bertling("embed", "--cp", tmp_path / "model", "word1", "-o", tmp_path / "vectors.csv").error
    )
