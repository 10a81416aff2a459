"""Vocabulary, evaluation and anatomy: what the tools compute, apart from how a command shows it."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TEXT, VOCAB, World, bertling, make_world
from transformers import AutoTokenizer

from bertling.checkpoint import load_checkpoint, write_model
from bertling.files import BertlingError
from bertling.inference import BOX, load
from bertling.labelled import load_labelled
from bertling.presets import PRESETS
from bertling.runtime import build_runtime
from bertling.samples import open_samples
from bertling.settings import parse_settings
from bertling.tasks import classifier_batches, evaluate_classifier
from bertling.text import TextOptions
from bertling.tokenizer import Tokenizer, train_vocabulary
from bertling.tools.anatomy import anatomy
from bertling.tools.evaluate import evaluate
from bertling.tools.vocab import make_vocabulary


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


def test_a_vocabulary_is_the_same_each_time_and_loads_elsewhere(tmp_path: Path) -> None:
    made = [make_vocabulary([TEXT], tmp_path / name, 320, options=TextOptions()) for name in ("a", "b")]
    assert made[0]["fingerprint"] == made[1]["fingerprint"]
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = "The old lighthouse, Café, stood [MASK]!"
    tokenizer = Tokenizer.load(tmp_path / "a")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")(text)["input_ids"]
    assert theirs == [tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]


def test_a_cased_vocabulary_keeps_capitals(tmp_path: Path) -> None:
    make_vocabulary([TEXT], tmp_path / "v", 400, options=TextOptions(), lowercase=False)
    tokenizer = Tokenizer.load(tmp_path / "v")
    assert tokenizer.lowercase is False
    assert tokenizer.encode("The") != tokenizer.encode("the")


def test_an_existing_folder_keeps_its_other_files_even_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    make_vocabulary([TEXT], tmp_path, 200, options=TextOptions())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self: Tokenizer, folder: Path) -> None:
        (folder / "vocab.txt").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(BertlingError, match="the disk is full"):
        make_vocabulary([TEXT], tmp_path, 250, options=TextOptions(), force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_vocabulary_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Tokenizer.load(VOCAB)

    def train(*arguments: Any, **options: Any) -> Tokenizer:
        (tmp_path / "v").mkdir()
        other.save(tmp_path / "v")
        return train_vocabulary(*arguments, **options)

    monkeypatch.setattr("bertling.tools.vocab.train_vocabulary", train)
    with pytest.raises(BertlingError, match=r"vocab\.txt: exists already; give --force"):
        make_vocabulary([TEXT], tmp_path / "v", 250, options=TextOptions())
    assert Tokenizer.load(tmp_path / "v").entries == other.entries


def test_words_that_no_vocabulary_can_spell_count_for_nothing(tmp_path: Path) -> None:
    genome = "".join("acgt"[i * i % 7 % 4] for i in range(3000))
    (tmp_path / "mixed.txt").write_text(TEXT.read_text() + f"\nthe genome {genome} ends\n" * 50)
    for name, text in (("plain", TEXT), ("mixed", tmp_path / "mixed.txt")):
        make_vocabulary([text], tmp_path / name, 320, options=TextOptions())
    entries = [set(Tokenizer.load(tmp_path / name).entries) for name in ("plain", "mixed")]
    assert not [entry for entry in entries[1] - entries[0] if len(entry.strip("#")) > 2 and set(entry) <= set("#acgt")]
    (tmp_path / "genome.txt").write_text(f"{genome}\n" * 9)
    with pytest.raises(BertlingError, match="no text to make it from; give files with words of up to 100 characters"):
        make_vocabulary([tmp_path / "genome.txt"], tmp_path / "none", 320, options=TextOptions())


def test_files_may_follow_one_input(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT.read_text() if name == "a" else "zebra quagga zebra quagga\n" * 99)
    words = ["-i", tmp_path / "a.txt", tmp_path / "b.txt", "-o", tmp_path / "v", "--size", 320]
    assert bertling("vocab", *words).status == 0
    assert "zebra" in Tokenizer.load(tmp_path / "v").entries
    rows = ["-l", "x", "-o", tmp_path / "d", "-m", 16, "-v", tmp_path / "v", "--workers", 1, "--json"]
    both = bertling("prepare", *words[:3], *rows).answer
    assert both["tokens"] > bertling("prepare", *words[:2], *rows, "--force").answer["tokens"]


def test_any_file_of_a_vocabulary_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BertlingError, match=r"tokenizer\.json: exists already; give --force"):
        make_vocabulary([TEXT], tmp_path, 200, options=TextOptions())
    with pytest.raises(BertlingError, match=r"tokenizer\.json: is a file; give a folder"):
        make_vocabulary([TEXT], tmp_path / "tokenizer.json", 200, options=TextOptions())


def test_scores_of_a_masked_language_model_are_those_of_its_training(world: World) -> None:
    result = evaluate(world.mlm / "checkpoints" / "last", world.data / "val_tiny_16_123", device="cpu")
    figures = result.figures
    samples = open_samples(world.data / "val_tiny_16_123")
    counts = samples.counts(400)[5:]
    assert figures["unigram accuracy"] == pytest.approx(counts.max() / counts.sum())
    ordinary = samples.fetch(np.arange(samples.rows)) > 4
    assert figures["scored"] == sum(max(1, round(0.15 * n)) for n in ordinary.sum(1).tolist())
    assert figures["loss"] == pytest.approx(math.log(400), abs=0.3)  # after four steps it knows next to nothing
    assert evaluate(world.mlm / "checkpoints" / "last", world.data / "val_tiny_16_123").figures == figures
    assert result.text().splitlines()[-1] == f"protocol: {result.protocol}"
    runtime = build_runtime(parse_settings({"device": "cpu", "compile": "false"}))
    assert result.protocol.endswith(f"; {runtime.describe()}")


def test_the_model_in_the_box_is_scored_and_exported_where_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "some.tsv").write_text("sentence\tlabel\na lovely , witty film\t1\nan awful , dull mess\t0\n")
    assert bertling("evaluate", "--data", tmp_path / "some.tsv", "--json").answer["accuracy"] == 1.0
    rows = ["-i", TEXT, "-l", "x", "-o", tmp_path, "-m", 32, "-v", BOX, "--split", "1,0,0", "--workers", 1]
    assert bertling("prepare", *rows).status == 0
    scored = bertling("evaluate", "--data", tmp_path / "train_x_32_123", "--json")
    assert "model: the one that comes with bertling" in scored.err
    assert scored.answer["accuracy"] > 2 * scored.answer["unigram accuracy"]
    assert bertling("export", "-o", tmp_path / "mine").status == 0
    assert load(tmp_path / "mine").fill("the [MASK] .")[0]["masks"][0] == load().fill("the [MASK] .")[0]["masks"][0]


def test_scores_of_a_classifier_are_those_of_its_answers(world: World) -> None:
    figures = evaluate(world.classifier, world.dev).figures
    from bertling.inference import load

    data = load_labelled(world.dev)
    assert data.labels is not None
    answers = [int(one["label"]) for one in load(world.classifier).classify(data.texts)]
    right = [answer == label for answer, label in zip(answers, data.labels.tolist(), strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(right) / 20)
    assert figures["majority class"] == 0.5


def test_a_classifier_is_scored_on_texts_cut_as_in_its_training(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-0000004"
    shutil.copytree((world.classifier / "checkpoints" / "last").resolve(), checkpoint)
    assert " texts, cut at 16 tokens; cpu, " in evaluate(checkpoint, world.dev, device="cpu").protocol  # the model's
    for name in ("config.ini", "run.json"):
        shutil.copy(world.classifier / name, run)
    loaded, data = load_checkpoint(checkpoint), load_labelled(world.dev)
    runtime = build_runtime(parse_settings({"device": "cpu"}))
    losses = {}
    for given, used in ((128, 16), (5, 5)):
        lines = (world.classifier / "config.ini").read_text().splitlines()
        lines = [f"seq-len = {given}" if line.startswith("seq-len") else line for line in lines]
        (run / "config.ini").write_text("\n".join(lines) + "\n")
        result = evaluate(checkpoint, world.dev, device="cpu")
        assert f" texts, cut at {used} tokens; " in result.protocol
        scores = evaluate_classifier(loaded.model, data, classifier_batches(data, loaded.tokenizer, used), runtime)
        losses[used] = result.figures["loss"]
        assert losses[used] == pytest.approx(scores["loss"])
    assert abs(losses[16] - losses[5]) > 1e-6


def test_classes_are_told_by_name_whatever_their_order_in_the_file(world: World, tmp_path: Path) -> None:
    names = {"0": "bad", "1": "good"}
    loaded = load_checkpoint(world.classifier)
    lines = world.dev.read_text().splitlines()[1:]
    named = tmp_path / "named.tsv"
    named.write_text("\n".join(["sentence\tlabel", *(line[:-1] + names[line[-1]] for line in lines)]) + "\n")
    assert loaded.model.config.labels == ("0", "1")
    with pytest.raises(BertlingError, match=r"named\.tsv: label 'bad' does not occur"):
        evaluate(world.classifier, named)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_anatomy_of_each_preset_adds_up(preset: str) -> None:
    drawn = anatomy(None, preset, "small", 8192)
    assert sum(row.parameters for row in drawn.rows) == drawn.count.total > drawn.count.without_embeddings
    assert drawn.title == f"{preset} small, vocabulary of 8,192: BertForMaskedLM"
    lines = drawn.text().splitlines()
    assert lines[-2].split()[-1] == f"{drawn.count.total:,}"
    assert len(set(map(len, lines[1:]))) == 1  # one table
    assert [line.split()[0] for line in lines[1:-2]] == [row.path for row in drawn.rows]
    assert not any(line.startswith(" ") for line in lines)


def test_scoring_masked_words_refuses_what_it_cannot_use(world: World, tmp_path: Path) -> None:
    words = ["prepare", "-i", TEXT, "-l", "long", "-o", tmp_path, "-m", 32, "-v", VOCAB, "--workers", 1]
    assert bertling(*words).status == 0
    short, long = world.data / "val_tiny_16_123", tmp_path / "val_long_32_123"
    for begin in (["evaluate", "--cp", world.mlm], ["compare", world.mlm, world.mlm]):
        for flag in ("text-column", "label-column"):
            ended = bertling(*begin, "--data", short, f"--{flag}", "x", "--device", "cpu")
            refusal = f"{flag}: is for classifiers, and {world.mlm} is a masked language model; leave it out"
            assert ended.error == refusal
        assert bertling(*begin, "--data", long, "--device", "cpu").error == (
            f"{long}: has rows of 32 ids, the model takes at most 16; prepare it again with -m 16"
        )
        for table in (tmp_path / name for name in ("a.TSV", "a.csv.gz", "a.ndjson", "a.PARQUET")):
            assert bertling(*begin, "--data", table).error.startswith(f"{table}: labelled texts, but")


def test_the_anatomy_of_a_checkpoint_is_that_of_its_model(world: World) -> None:
    model = load_checkpoint(world.classifier).model
    drawn = anatomy(world.classifier, "modern", "mini", 8192)
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.hidden_size
    assert drawn.count.total == sum(parameter.numel() for parameter in model.parameters()) - padding
    assert drawn.title.endswith("BertForSequenceClassification, modern")
    assert drawn.to_dict()["modules"][0]["path"] == "embeddings.word_embeddings"
    with pytest.raises(BertlingError, match="holds no checkpoint"):
        anatomy(VOCAB, "modern", "mini", 8192)


def test_an_encoder_without_a_head_embeds_but_has_nothing_to_score(world: World, tmp_path: Path) -> None:
    encoder = load_checkpoint(world.mlm, head="none")
    folder = tmp_path / "encoder"
    folder.mkdir()
    write_model(folder, encoder.model, encoder.tokenizer)
    with pytest.raises(BertlingError, match="an encoder without a head has nothing to score"):
        evaluate(folder, world.dev)
    assert bertling("summary", "--cp", folder).status == 0
    assert f"{folder} has no head for masked words" in bertling("fill", "--cp", folder, "a [MASK]").error
    vectors = load(folder).embed("the old river")
    assert np.array_equal(vectors, load(world.mlm).embed("the old river"))
