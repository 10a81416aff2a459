"""Labelled texts: formats, refusals, batches that cover each text once, and scores equal to scikit-learn's."""

import gzip
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from bertling import labelled
from bertling.files import BertlingError
from bertling.labelled import LabelledBatches, LabelledTexts, load_labelled
from bertling.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = ["good", "bad", "film", "the", "a", "fine", "dull", ",", "."]
TOKENIZER = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])


def make_texts(count: int, classes: int = 2, seed: int = 0) -> LabelledTexts:
    """Random texts with lengths spread like SST-2's phrases: mean about 9 words, a long tail."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.geometric(1 / 9, count), 1, 50)
    texts = [" ".join(rng.choice(WORDS, length)) for length in lengths]
    return LabelledTexts(Path("made.tsv"), texts, np.arange(count, dtype=np.int64) % classes)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
    return path


def write_parquet(folder: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return folder / "data.parquet"


RECORDS = ({"sentence": 'a "good" film', "label": 1}, {"label": 0, "sentence": "b"})
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.tsv", 'sentence\tlabel\na "good" film\t1\nb\t0\n'),
        ("windows.tsv", '\ufeffsentence\tlabel\r\na "good" film\t1\r\nb\t0\r\n'),
        ("data.tsv.gz", 'sentence\tlabel\na "good" film\t1\nb\t0\n'),
        ("data.csv", 'Label,id,Sentence\n1,7,"a ""good"" film"\n0,8,b\n'),
        ("data.csv.gz", 'label,sentence\n1,"a ""good"" film"\n\n0,b\n'),
        ("data.TSV.GZ", 'sentence\tlabel\na "good" film\t1\nb\t0\n'),
        ("data.jsonl", JSONL),
        ("data.ndjson", JSONL),
        ("data.jsonl.gz", JSONL),
    ],
)
def test_text_formats(tmp_path: Path, name: str, content: str) -> None:
    data = load_labelled(write(tmp_path, name, content))
    assert data.texts == ['a "good" film', "b"]
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]
    assert data.labels.dtype == np.int64
    assert data.names is None
    assert data.num_labels == 2


def test_tsv_does_not_quote_and_csv_does(tmp_path: Path) -> None:
    tsv = load_labelled(write(tmp_path, "a.tsv", 'text\tlabel\n"open\t0\nclosed"\t1\n'))
    assert tsv.texts == ['"open', 'closed"']
    csv = load_labelled(write(tmp_path, "a.csv", 'text,label\n"two\nlines, one text",0\nx,1\n'))
    assert csv.texts == ["two\nlines, one text", "x"]
    long = load_labelled(write(tmp_path, "b.csv", f"text,label\n{'word ' * 40_000},0\nx,1\n"))
    assert len(long.texts[0]) == 200_000


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, idx=[0, 1], sentence=["a", "b"], label=[1, 0])
    shutil.copy(path, tmp_path / "DATA.PARQUET")
    for one in (path, tmp_path / "DATA.PARQUET"):
        data = load_labelled(one)
        assert data.texts == ["a", "b"]
        assert data.labels is not None
        assert data.labels.tolist() == [1, 0]


def test_labels_all_minus_one_mean_no_labels(tmp_path: Path) -> None:
    data = load_labelled(write_parquet(tmp_path, sentence=["a", "b"], label=[-1, -1]))
    assert data.labels is None
    with pytest.raises(BertlingError, match="has no labels"):
        labelled.check_training(data)


def test_words_as_labels_become_sorted_ids(tmp_path: Path) -> None:
    data = load_labelled(write(tmp_path, "a.csv", "text,label\nx,positive\ny, negative\nz,positive\n"))
    assert data.names == ("negative", "positive")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 1]
    assert data.id2label == {0: "negative", 1: "positive"}


def test_columns_by_name_and_by_number(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "sentence\tother\tlabel\tmark\nx\ty\t0\t5\n")
    assert load_labelled(path, text_column="other", label_column="mark").texts == ["y"]
    cola = write(tmp_path, "cola.tsv", "gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThem rode.\n")
    data = load_labelled(cola, text_column=3, label_column="1")
    assert data.texts == ["The sailors rode.", "Them rode."]
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"a\.txt: labelled texts come as \.parquet, \.tsv, \.csv or \.jsonl"),
        ("a.tsv", "", r"a\.tsv: is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl: is empty"),
        ("a.parquet", "", r"a\.parquet: is empty"),
        ("a.parquet", "text", r"a\.parquet: is not a readable parquet file"),
        ("a.tsv", "sentence\tlabel\n", "holds no labelled texts"),
        ("a.tsv", "sentence\tlabel\n\t0\n \t1\n", "all of its texts are empty"),
        ("a.tsv", "phrase\tlabel\nx\t0\n", "no text column was recognised; its columns are 'phrase', 'label'"),
        ("a.csv", "text,mark\nx,0\n", "no label column was recognised; its columns are 'text', 'mark'"),
        ("a.csv", "text,text,label\nx,y,0\n", r"a\.csv: has 2 columns named 'text'; rename one"),
        ("a.tsv", "text\tlabel\nx\t0\ny\n", r"a\.tsv: line 3: 1 fields instead of 2"),
        ("a.csv", "text,label\nx,0\ny,z,1\n", r"a\.csv: line 3: 3 fields instead of 2; quote a text"),
        ("a.csv", 'text,label\n"x"y,0\n', r"a\.csv: line 2: is not valid CSV"),
        ("a.tsv", "text\tlabel\nx\t0\ny\t1.5\n", "line 3: the label '1.5' is neither an integer nor a word"),
        ("a.tsv", "text\tlabel\nx\t0\ny\t \n", "line 3: the label ' ' is neither"),
        ("a.tsv", "text\tlabel\nx\t0\ny\tgood\n", "line 3: the label 'good': some labels are words, some numbers"),
        ("a.tsv", "text\tlabel\nx\t0\ny\t-2\n", "line 3: the label '-2' is no class number"),
        ("a.tsv", "text\tlabel\nx\t0\ny\t123456\n", "line 3: the label '123456' is no class number"),
        ("a.tsv", "text\tlabel\nx\t0\ny\t-1\n", r"line 3: the label is -1 \(none\) but other texts have one"),
        ("a.tsv", b"text\tlabel\nx\t0\ncaf\xe9\t1\n", r"a\.tsv: line 3: byte 0xe9 is not UTF-8"),
        ("a.tsv", "text\tlabel\nx\t0\n".encode("utf-16"), r"a\.tsv: line 1: a zero byte"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{', r"a\.jsonl: line 2: is not valid JSON"),
        ("a.jsonl", '["x", 0]\n', r"line 1: must hold a JSON object, not \['x', 0\]"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y"}\n', "line 2: the field 'label' is missing"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y", "label": null}\n', "line 2: the label None is neither"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": 5, "label": 1}\n', "line 2: the text is 5, not a string"),
        ("a.jsonl", '{"text": "x\\ud83d", "label": 0}\n', r"line 1: character 2 of the text is no Unicode"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(BertlingError, match=message) as caught:
        load_labelled(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_more_bad_files(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match=r"none\.tsv: no such file"):
        load_labelled(tmp_path / "none.tsv")
    with pytest.raises(BertlingError, match=r"none\.parquet: no such file"):
        load_labelled(tmp_path / "none.parquet")
    with pytest.raises(BertlingError, match=r"there is no column 'stars'; its columns are 'text', 'label'"):
        load_labelled(write_parquet(tmp_path, text=["a"], label=[0]), label_column="stars")
    with pytest.raises(BertlingError, match=r"row 1: the label 0\.5 is neither"):
        load_labelled(write_parquet(tmp_path, text=["a", "b"], label=[0.5, 1.0]))
    twice = pa.table([["a"], ["b"], [0]], names=["text", "text", "label"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    for column in (None, "text"):
        with pytest.raises(BertlingError, match=r"twice\.parquet: has 2 columns named 'text'; rename one$"):
            load_labelled(tmp_path / "twice.parquet", text_column=column)
    headless = write(tmp_path, "a.tsv", "x\t1\ny\t0\n")
    with pytest.raises(BertlingError, match="give both as names, or both as 0-based numbers"):
        load_labelled(headless, text_column=0)
    with pytest.raises(BertlingError, match="there is no column '2'; its columns are '0', '1'"):
        load_labelled(headless, text_column=0, label_column=2)
    with pytest.raises(BertlingError, match="column '1' is named for texts and for labels; name two"):
        load_labelled(headless, text_column=1, label_column=1)
    for raw in (b"no gzip", gzip.compress(b"text\tlabel\n" * 100)[:-12]):
        (tmp_path / "a.tsv.gz").write_bytes(raw)
        with pytest.raises(BertlingError, match=r"a\.tsv\.gz: is not a complete gzip file"):
            load_labelled(tmp_path / "a.tsv.gz")
    many = "".join(f"x\tword{i}\n" for i in range(labelled.MAX_CLASSES + 1))
    with pytest.raises(BertlingError, match="10,001 different labels are no classes"):
        load_labelled(write(tmp_path, "many.tsv", "text\tlabel\n" + many))


def test_training_data_needs_classes_without_gaps() -> None:
    texts = LabelledTexts(Path("a.tsv"), ["x", "y"], np.array([1, 1]), ("bad", "good"))
    with pytest.raises(BertlingError, match=r"a\.tsv: all labels are of one class \(good\)"):
        labelled.check_training(texts)
    with pytest.raises(BertlingError, match="the labels are 1, 2: number the classes 0, 1"):
        labelled.check_training(LabelledTexts(Path("a.tsv"), ["x", "y"], np.array([1, 2])))


def test_dev_gets_the_class_numbers_of_train() -> None:
    train = LabelledTexts(Path("t.tsv"), ["x"] * 3, np.array([0, 1, 2]), ("bad", "good", "so-so"))
    dev = LabelledTexts(Path("d.tsv"), ["x"] * 2, np.array([0, 1]), ("good", "so-so"))
    agreed = labelled.check_agree(train, dev)
    assert agreed.names == train.names
    assert agreed.labels is not None
    assert agreed.labels.tolist() == [1, 2]
    with pytest.raises(BertlingError, match=r"d\.tsv: label 'fine' does not occur in t\.tsv"):
        labelled.check_agree(train, LabelledTexts(Path("d.tsv"), ["x"], np.array([0]), ("fine",)))
    with pytest.raises(BertlingError, match="must be both words or both numbers"):
        labelled.check_agree(train, LabelledTexts(Path("d.tsv"), ["x"], np.array([0])))
    numbers = LabelledTexts(Path("t.tsv"), ["x"] * 2, np.array([0, 1]))
    with pytest.raises(BertlingError, match=r"label '2' does not occur in t\.tsv"):
        labelled.check_agree(numbers, LabelledTexts(Path("d.tsv"), ["x"], np.array([2])))
    named = LabelledTexts(Path("d.tsv"), ["x"], np.array([2]), labelled.SST2_NAMES)
    with pytest.raises(BertlingError, match="label '2' does not occur"):
        labelled.check_agree(LabelledTexts(Path("t.tsv"), ["x"] * 2, np.array([0, 1]), labelled.SST2_NAMES), named)
    assert labelled.check_agree(numbers, LabelledTexts(Path("d.tsv"), ["x"], None)).labels is None


def test_sst2_files(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    for split in ("train", "test"):
        (tmp_path / "datasets" / f"{split}-00000-of-00001.parquet").touch()
    with pytest.raises(BertlingError, match=r"validation-00000-of-00001\.parquet: missing; fetch it by 'bertling"):
        labelled.sst2_files(tmp_path)
    (tmp_path / "datasets" / "validation-00000-of-00001.parquet").touch()
    assert list(labelled.sst2_files(tmp_path)) == ["train", "validation", "test"]
    (tmp_path / "datasets" / "test-00000-of-00001.parquet").unlink()
    assert list(labelled.sst2_files(tmp_path)) == ["train", "validation"]
    (tmp_path / "datasets").rename(tmp_path / "data")
    (tmp_path / "datasets" / "sst2").mkdir(parents=True)
    (tmp_path / "data").rename(tmp_path / "datasets" / "sst2" / "data")  # as a download leaves them
    assert labelled.sst2_files(tmp_path)["train"].parent == tmp_path / "datasets" / "sst2" / "data"
    for split in ("train", "validation"):
        (tmp_path / "datasets" / f"{split}-00000-of-00001.parquet").touch()
    assert labelled.sst2_files(tmp_path)["train"].parent == tmp_path / "datasets"


@pytest.mark.skipif(not SHARED.exists(), reason="the real data is not here")
def test_glue_files_as_they_are() -> None:
    dev, parquet = (load_labelled(SHARED / "sst2" / n) for n in ("dev.tsv", "validation-00000-of-00001.parquet"))
    assert dev.texts == parquet.texts
    assert len(dev.texts) == 872
    assert np.array_equal(labelled.labels_of(dev), labelled.labels_of(parquet))
    assert len(load_labelled(SHARED / "sst2" / "train.tsv").texts) == 67_349
    assert load_labelled(SHARED / "sst2" / "test-00000-of-00001.parquet").labels is None
    cola = [load_labelled(SHARED / "glue" / "CoLA" / f"{s}.tsv", text_column=3, label_column=1) for s in ("dev", "val")]
    assert [len(data.texts) for data in cola] == [1043, 1301]
    rte = load_labelled(SHARED / "glue" / "RTE" / "dev.tsv", text_column="sentence2")
    assert rte.names == ("entailment", "not_entailment")


def make_batches(count: int = 1003, batch_size: int = 32, seed: int = 7, seq_len: int = 64) -> LabelledBatches:
    return LabelledBatches(make_texts(count), TOKENIZER, batch_size=batch_size, seq_len=seq_len, seed=seed)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 64), (1, 5), (2, 8), (3, 1), (4, 7)])
def test_each_text_once_per_epoch_over_ranks_and_micro_batches(world_size: int, micro_batch_size: int) -> None:
    batches = make_batches(count=130)  # the last batch has 2 texts: fewer than some numbers of ranks
    assert batches.steps_per_epoch == 5
    for epoch in range(2):
        seen = []
        for step in range(epoch * 5, epoch * 5 + 5):
            whole = batches.batch(step)
            seen += batches.indices(step).tolist()
            rows, labels, numbers = [], [], set()
            for rank in range(world_size):
                micro, total = batches.micro_batches(
                    step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size
                )
                numbers.add(len(micro))
                assert total == len(whole.labels) == whole.count
                for batch in micro:
                    assert len(batch.input_ids) <= micro_batch_size
                    assert batch.count == int((batch.labels != -100).sum())
                    real = batch.input_ids[batch.labels != -100]
                    rows += [[i for i in row if i] for row in real.tolist()]
                    labels += batch.labels[batch.labels != -100].tolist()
            assert len(numbers) == 1  # the ranks stay in step
            assert sorted(zip(rows, labels, strict=True)) == sorted(
                zip(([i for i in row if i] for row in whole.input_ids.tolist()), whole.labels.tolist(), strict=True)
            )
        assert sorted(seen) == list(range(130))


def test_batches_are_pure_in_seed_and_step() -> None:
    first, second = make_batches(), make_batches()
    steps = [40, 3, 70, 3, 31]
    for step in steps:
        assert torch.equal(first.batch(step).input_ids, second.batch(step).input_ids)
    fresh = make_batches().indices(70)  # as after a resume: no earlier step was asked for
    assert np.array_equal(fresh, first.indices(70))
    assert not np.array_equal(first.indices(3), make_batches(seed=8).indices(3))
    assert not np.array_equal(first.indices(0), first.indices(first.steps_per_epoch))


def test_batches_hold_the_right_text_and_little_padding() -> None:
    data = make_texts(6000)
    batches = LabelledBatches(data, TOKENIZER, batch_size=64, seq_len=128, seed=0)
    places = used = 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        real = batch.input_ids != TOKENIZER.pad_id
        assert batch.attention_mask is None or torch.equal(batch.attention_mask, real)
        assert batch.attention_mask is not None or bool(real.all())
        places, used = places + real.numel(), used + int(real.sum())
        index = int(batches.indices(step)[0])
        ids = batch.input_ids[0][real[0]].tolist()
        assert ids == [TOKENIZER.cls_id, *TOKENIZER.encode(data.texts[index]), TOKENIZER.sep_id]
        assert int(batch.labels[0]) == labelled.labels_of(data)[index]
    assert used / places > 0.9  # padding to 128 would give 0.09, widths of whole eights 0.7
    # Nothing sorts the epoch itself: short and long batches come mixed.
    order = [batches.batch(step).input_ids.shape[1] for step in range(20)]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_unpadded_batch_has_no_mask_and_long_texts_are_cut() -> None:
    data = LabelledTexts(Path("a.tsv"), ["good film " * 20, "bad film " * 20], np.array([1, 0]))
    batches = LabelledBatches(data, TOKENIZER, batch_size=2, seq_len=10, seed=0)
    batch = batches.batch(0)
    assert batch.attention_mask is None
    assert batch.input_ids.shape == (2, 10)
    assert batch.input_ids[:, -1].tolist() == [TOKENIZER.sep_id] * 2
    assert batches.truncated == 2
    with pytest.raises(BertlingError, match="seq-len 2: must be at least 3"):
        LabelledBatches(data, TOKENIZER, batch_size=2, seq_len=2, seed=0)


def test_evaluation_batches_hold_each_text_once_by_length() -> None:
    data = make_texts(100)
    batches = labelled.evaluation_batches(data, TOKENIZER, batch_size=16, seq_len=64)
    places = np.concatenate([indices for indices, _ in batches])
    assert sorted(places.tolist()) == list(range(100))
    widths = [batch.input_ids.shape[1] for _, batch in batches]
    assert widths == sorted(widths)
    for indices, batch in batches:
        assert np.array_equal(batch.labels.numpy(), labelled.labels_of(data)[indices])
    unlabelled = LabelledTexts(data.path, data.texts, None)
    _, batch = labelled.evaluation_batches(unlabelled, TOKENIZER, batch_size=16, seq_len=64)[0]
    assert batch.labels.tolist() == [-100] * 16
    assert batch.count == 0


def test_scores_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for classes, used in ((2, 2), (5, 5), (5, 3)):
        labels, predictions = rng.integers(0, used, 200), rng.integers(0, used, 200)
        scores = labelled.classification_scores(labels, predictions, classes)
        assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
        assert scores["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
        assert scores["confusion"] == confusion_matrix(labels, predictions, labels=range(classes)).tolist()


def test_floors() -> None:
    texts = ["good", "fine film", "good film", "bad film", "dull"] * 10
    train = LabelledTexts(Path("t"), texts, np.array([1, 1, 1, 0, 0] * 10))
    dev = LabelledTexts(Path("d"), ["good film", "bad", "dull , dull", "fine"], np.array([1, 0, 0, 1]))
    assert labelled.majority_floor(train, dev) == 0.5
    floors = [labelled.bag_of_words_floor(train, dev) for _ in range(2)]
    assert floors == [1.0, 1.0]
    with warnings.catch_warnings(action="error"):  # scikit-learn takes many classes for numbers
        each = LabelledTexts(Path("e"), [f"word{i}" for i in range(30)], np.arange(30))
        assert labelled.bag_of_words_floor(each, each) == 1.0


def test_summary_over_seeds() -> None:
    summary = labelled.summarise_seeds([0.80, 0.82, 0.81])
    assert summary.n == 3
    assert summary.mean == pytest.approx(0.81)
    assert summary.sd == pytest.approx(0.01)
    assert summary.low == pytest.approx(0.81 - 4.302653 * 0.01 / 3**0.5)  # t(2, 97.5 %)
    assert summary.high == pytest.approx(0.81 + 4.302653 * 0.01 / 3**0.5)
    alone = labelled.summarise_seeds([0.8])
    assert (alone.n, alone.mean, alone.sd, alone.low, alone.high) == (1, 0.8, None, None, None)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "")
    with pytest.raises(BertlingError, match=re.escape(str(path))):
        load_labelled(path)
