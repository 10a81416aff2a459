"""The commands as a user meets them: help, answers, texts, settings files, checkpoints, interruptions."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from commands import SMALL, TEXT, VOCAB, World, bertling, listing, make_world

from bertling import cli, runtime
from bertling.console import unbroken
from bertling.files import BertlingError
from bertling.options import GROUPS

HEAVY = {"torch", "numpy", "pyarrow", "tokenizers", "sklearn", "matplotlib", "rich", "safetensors", "msgpack"}
FAST = [*SMALL, "--batch-size", 4, "--max-iters", 2, "--val-interval", 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture
def work(world: World, tmp_path: Path) -> Path:
    """A work folder of one's own with the world's data."""
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "datasets").symlink_to(world.data)
    return tmp_path


def texts_of(err: str) -> str:
    return err.split("settings: ")[1].splitlines()[0]


def test_help_is_light_and_needs_no_heavy_module() -> None:
    code = (
        "import sys; sys.argv = ['bertling', 'pretrain', '--help']; from bertling.cli import main; main()\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout.startswith("Usage: bertling pretrain")


def test_without_a_command_the_help_is_shown() -> None:
    assert bertling().out == bertling("--help").out
    assert "Raise your own small BERT" in bertling("-h").out


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_each_command_has_help_that_fits_the_screen(command: str) -> None:
    done = bertling(command, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: bertling {command}")
    assert max(map(len, done.out.splitlines())) <= 120
    assert "--json" in done.out


def test_help_of_a_training_is_grouped_and_says_types_and_defaults() -> None:
    pretrain, finetune = bertling("pretrain", "--help").out, bertling("finetune", "--help").out
    places = [pretrain.index(f"\n{heading}:\n") for heading in GROUPS.values()]
    assert places == sorted(places)
    words = " ".join(pretrain.split())
    assert "--preset modern|bert|distilbert|seed" in words
    assert "--n-layers, --n-layer, --num-hidden-layers N" in words
    assert "--learning-rate X highest learning rate of AdamW [default: 0.001]" in words
    assert "--dropout, --hidden-dropout-prob X dropout everywhere in the model [default: 0.0]" in words
    assert "dropout everywhere in the model [default: 0.1]" in " ".join(finetune.split())
    assert "--dataset-pattern" in pretrain
    assert "--dataset-pattern" not in finetune
    assert "--train-input" in finetune
    assert "--train-input" not in pretrain
    assert "--task-type" not in pretrain


def test_python_m_bertling() -> None:
    done = subprocess.run([sys.executable, "-m", "bertling", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bertling, version ")


def test_vocab_answers_and_keeps_what_else_is_in_the_folder(tmp_path: Path) -> None:
    made = bertling("vocab", "-i", TEXT, "-o", tmp_path / "new", "--size", 300, "--json")
    assert made.answer["entries"] == 300
    assert made.err == ""
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (tmp_path / "new" / "runs").mkdir()
    again = bertling("vocab", "-i", TEXT, "-o", tmp_path / "new", "--size", 250, "--force")
    assert again.out.startswith(f"{tmp_path / 'new'}: 250 entries")
    assert len((tmp_path / "new" / "vocab.txt").read_text().splitlines()) == 250
    assert listing(tmp_path / "new").keys() == {"runs", "vocab.txt", "tokenizer.json", "tokenizer_config.json"}


def test_vocab_reads_another_field(tmp_path: Path) -> None:
    text = TEXT.read_text()
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text}) + "\n")
    made = bertling(
        "vocab", "-i", tmp_path / "a.jsonl", "--text-field", "body", "-o", tmp_path / "v", "--size", 200, "--json"
    )
    assert made.answer["entries"] == 200


def test_prepare_and_inspect_answer_in_both_forms(tmp_path: Path) -> None:
    words = ["prepare", "-i", TEXT, "-o", tmp_path, "-m", 16, "-v", VOCAB, "--workers", 1]
    card = bertling(*words, "-l", "one", "--json").answer
    assert card["splits"]["train"]["samples"] > 20
    text = bertling(*words, "-l", "two", "--format", "msgpack", "--split", "0.8,0.2,0").out
    assert text.startswith("data card: two, 16 tokens a sample, method split, seed 123")
    assert (tmp_path / "train_two_16_123.msgpack.gz").is_file()
    assert not (tmp_path / "test_two_16_123.msgpack.gz").exists()

    report = bertling("inspect", tmp_path / "train_one_16_123", "--json", "-n", 2).answer
    assert len(report["shown"]) == 2
    assert report["audit"]["special_masked"] == report["audit"]["special_drawn"] == 0
    static = bertling("inspect", tmp_path / "train_two_16_123.msgpack.gz", "-v", VOCAB)
    assert "masked places" in static.out


def test_settings_come_from_both_files_and_flags_win(work: Path) -> None:
    (work / "config.ini").write_text("base-dir = wiki\nheads: 4\nd_model = 64 # wide\nbatch-size = 8\nseed = 1\n")
    (work / "local_config.ini").write_text("d-model = 32\nn-layer = 1\nbatch-size = 4\nmax-iters = 2\n")
    flags = ["--seed", 7, "--dtype", "fp32", "--threads", 1, "--no-fused-adamw"]
    done = bertling("pretrain", *flags, "--json", cwd=work)
    assert done.answer["run"] == "wiki/runs/run0"
    assert done.answer["step"] == 2
    assert done.answer["finished"] is True
    shown = texts_of(done.err).split()
    assert {"d-model=32", "heads=4", "batch-size=4", "seed=7", "n-layers=1", "fused-adamw=false"} <= set(shown)
    assert not any(word.startswith("train-input") or word.startswith("seeds") for word in shown)
    saved = (work / "wiki" / "runs" / "run0" / "config.ini").read_text()
    assert "d-model = 32\n" in saved
    assert (work / "wiki" / "runs" / "run0" / "accuracy.png").is_file()


def test_a_named_settings_file_replaces_the_usual_ones(work: Path) -> None:
    (work / "config.ini").write_text("no-such-key = 1\n")
    (work / "mine.ini").write_text(
        "[anything]\nbase-dir = wiki\nd-model = 32\nheads = 4\nn-layers = 1\nmax-iters = 1\n"
    )
    done = bertling("pretrain", "-c", "mine.ini", "--dtype", "fp32", "--run-id", "named", cwd=work)
    assert done.status == 0, done.err
    assert done.out.startswith("wiki/runs/named: step 1, ")


def test_a_checkpoint_can_be_named_in_many_ways(world: World, tmp_path: Path) -> None:
    best = (world.mlm / "checkpoints" / "best").resolve()
    plain = tmp_path / "hf"
    plain.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(best / name, plain)
    folders = [world.mlm, world.mlm / "checkpoints", world.mlm / "checkpoints" / "best", best, plain]
    answers = {bertling("fill", "--cp", folder, "the old [MASK] .", "--json").out for folder in folders}
    assert len(answers) == 1


def test_cp_goes_on_with_a_run_or_starts_a_new_one_from_plain_weights(work: Path) -> None:
    first = bertling("pretrain", *FAST, "--base-dir", "wiki", "--json", cwd=work)
    assert first.answer["step"] == 2
    longer = bertling("pretrain", "--cp", "wiki/runs/run0", "--max-iters", 3, "--json", cwd=work).answer
    assert (Path(longer["run"]).name, longer["step"]) == ("run0", 3)
    shutil.copytree(work / "wiki/runs/run0/checkpoints/last", work / "hf", symlinks=False)
    steps = ["--batch-size", 4, "--max-iters", 2, "--dtype", "fp32"]
    fresh = bertling("pretrain", "--cp", "hf", "--base-dir", "wiki", *steps, "--json", cwd=work)
    assert (Path(fresh.answer["run"]).name, fresh.answer["step"]) == ("run1", 2)
    assert "weights: hf" in fresh.err


def test_fill_takes_texts_from_everywhere(world: World, tmp_path: Path) -> None:
    texts = ["the [MASK] was old .", "a [MASK] by the [MASK]"]
    raw = ("\n".join(texts) + "\n").encode()
    (tmp_path / "texts.txt").write_bytes(raw)
    words = ["fill", "--cp", world.mlm, "-k", 3]
    said = bertling(*words, *texts)
    assert said.out.splitlines()[0] == texts[0]
    assert said.out.count("  [MASK]: ") == 3
    assert said.out == bertling(*words, "--input", tmp_path / "texts.txt").out
    assert said.out == bertling(*words, "--input", "-", stdin=raw).out
    assert said.out == bertling(*words, stdin=raw).out
    lines = bertling(*words, "--json", stdin=raw).out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["text"] for answer in answers] == texts
    assert [len(answer["masks"]) for answer in answers] == [1, 2]
    assert len(answers[0]["masks"][0]) == 3


def test_classify_answers_line_for_line(world: World) -> None:
    done = bertling("classify", "--cp", world.classifier, "--json", stdin=b"lovely film\n\ndull film\r\n")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["text"] for answer in answers] == ["lovely film", "", "dull film"]
    assert all(answer["label"] in ("0", "1") and 0.5 <= answer["score"] <= 1 for answer in answers)
    label, score, text = bertling("classify", "--cp", world.classifier, "lovely").out.rstrip("\n").split("\t")
    assert (label in ("0", "1"), float(score) >= 0.5, text) == (True, True, "lovely")


@pytest.mark.parametrize("here", [False, True])
def test_int8_is_taken_where_it_pays_and_else_said(here: bool, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if here and not runtime.int8_pays():
        pytest.skip("this CPU has AMX, or no dot products of int8 (VNNI)")
    monkeypatch.setattr(runtime, "int8_pays", lambda: here)
    done = bertling("classify", "--cp", world.classifier, "--dtype", "int8", "--json", "a lovely film")
    assert done.err == "" if here else done.err.startswith("note: dtype = int8 is for CPUs with instructions for it")
    usual = bertling("classify", "--cp", world.classifier, "--dtype", "auto", "--json", "a lovely film").answer
    assert done.answer["score"] == pytest.approx(usual["score"], abs=0.02 if here else 1e-6)


def test_a_text_that_is_too_long_is_said(world: World) -> None:
    long = "lovely " * 200
    done = bertling("embed", "--cp", world.mlm, long, "short")
    assert done.err.startswith("note: 1 of 2 texts are longer than the 14 tokens that the model reads, and cut there")
    for words, what in (
        (["classify", "--cp", world.classifier, long], "only its beginning was read"),
        (["fill", "--cp", world.mlm, long + "[MASK]"], "only a part around its masks was read"),
    ):
        done = bertling(*words)
        assert done.err.startswith("note: text 'lovely lovely")
        assert done.err.rstrip().endswith(f"longer than the model reads; {what}")
        as_json = bertling(*words, "--json")
        assert as_json.err == ""
        assert as_json.answer["truncated"] is True


def test_evaluate_scores_both_kinds(world: World) -> None:
    masked = bertling("evaluate", "--cp", world.mlm, "--data", world.data / "val_tiny_16_123", "--json").answer
    assert masked["scored"] > 10
    assert "seed 0" in masked["protocol"]
    assert "vocabulary of 400" in masked["protocol"]
    classes = bertling("evaluate", "--cp", world.classifier, "--data", world.dev, "--json").answer
    assert sum(map(sum, classes["confusion"])) == 20
    assert classes["majority class"] == 0.5
    assert "macro_f1: " in bertling("evaluate", "--cp", world.classifier, "--data", world.dev).out


def test_summary_draws_a_checkpoint_and_a_preset(world: World) -> None:
    text = bertling("summary", "--cp", world.mlm).out
    assert "word_embeddings" in text
    assert "400 x 32" in text
    big = bertling("summary", "--preset", "bert", "--size", "base", "--vocab-size", 30522, "--json").answer
    assert 109_000_000 < big["total"] < 111_000_000
    assert sum(module["parameters"] for module in big["modules"]) == big["total"]


def test_debug_shows_the_traceback_behind_any_command(tmp_path: Path) -> None:
    for words in (["--debug", "summary", "--preset", "none"], ["summary", "--preset", "none", "--debug"]):
        with pytest.raises(BertlingError, match="no such preset"):
            bertling(*words)
    assert bertling("summary", "--preset", "none").error.startswith("preset = 'none': no such preset")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory; lower micro-batch-size, or the size of the model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory; lower micro-batch-size"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "output: the disk is full: free some space"),
        (OSError(errno.EIO, "Input/output error", "disk.bin"), 2, "disk.bin: Input/output error"),
        (BertlingError("a: wrong\nmend it"), 2, "a: wrong mend it"),
    ],
)
def test_what_can_go_wrong_anywhere_is_one_line(
    error: BaseException, status: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertling.tools.vocab.make_vocabulary", mock.Mock(side_effect=error))
    done = bertling("vocab", "-i", TEXT, "-o", tmp_path)
    assert done.status == status
    assert done.err.strip().startswith(f"error: {line}")
    assert len(done.err.strip().splitlines()) == 1


def test_memory_of_a_gpu_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    error = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    monkeypatch.setattr("bertling.tools.vocab.make_vocabulary", mock.Mock(side_effect=error))
    assert bertling("vocab", "-i", TEXT, "-o", tmp_path).error.startswith("out of memory; lower micro-batch-size")


def test_an_error_that_cannot_be_told_keeps_its_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bertling", "vocab", "-i", str(tmp_path / "none.txt"), "-o", str(tmp_path)]
    with open("/dev/full", "w") if Path("/dev/full").exists() else open(os.devnull, "w") as full:
        assert subprocess.run(command, stderr=full).returncode == 2
    assert subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command]).returncode == 2


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertling.tools.vocab.make_vocabulary", mock.Mock(side_effect=ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        bertling("vocab", "-i", TEXT, "-o", tmp_path)


def test_a_rank_without_a_world_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")  # as some clusters set it in every container
    assert bertling("summary", "--preset", "bert").out != ""


def test_a_plot_that_cannot_be_drawn_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.draw([tmp_path])
    assert capsys.readouterr().err.startswith(f"warning: no plot: {tmp_path}")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "bertling", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bertling", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: output: the disk is full")


def test_answers_before_an_error_are_not_lost(world: World) -> None:
    done = bertling("fill", "--cp", world.mlm, "--json", stdin=b"a [MASK]\n" * 1024 + b"\xff\n")
    assert done.status == 2
    assert len(done.out.splitlines()) == 1024
    assert done.err.startswith("error: standard input: line 1025: ")


def test_lines_without_a_mask_are_kept_in_step(world: World) -> None:
    done = bertling("fill", "--cp", world.mlm, "--json", stdin=b"a [MASK]\n\nno mask\nthe [MASK] .\n")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [(answer["text"], len(answer["masks"])) for answer in answers] == [
        ("a [MASK]", 1),
        ("", 0),
        ("no mask", 0),
        ("the [MASK] .", 1),
    ]
    assert "has no [MASK]" in bertling("fill", "--cp", world.mlm, "no mask").error


def test_odd_streams_are_no_fault_of_the_program(world: World) -> None:
    closed = bertling("fill", "--cp", world.mlm, stdin=None)
    assert (closed.status, closed.err.count("\n")) == (2, 1)
    assert closed.err.startswith("error: no text: ")
    narrow = bertling("fill", "--cp", world.mlm, "caf\u20ac [MASK]", encoding="latin-1")
    assert narrow.status == 0, narrow.err
    assert narrow.out.startswith("caf\\u20ac [MASK]")


def test_settings_that_say_nothing_beside_the_others_are_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(world.data)
    idle = ["--nproc", 2, "--muon-learning-rate", 0.01, "--cooldown", 0.3]
    said = bertling("pretrain", *SMALL, "--base-dir", tmp_path, "--max-iters", 1, *idle).err
    for note in (
        "nproc counts only together with ddp",
        "muon-learning-rate counts only together with optimizer = muon",
    ):
        assert f"note: {note}" in said
    assert "note: cooldown counts only together with schedule = trapezoid" in said
    (tmp_path / "both.ini").write_text("seeds = 3\ntext-column = a\ndist-master-port = 29501\nmax-iters = 1\n")
    shared = bertling("pretrain", "-c", tmp_path / "both.ini", *SMALL, "--base-dir", tmp_path, "--json")
    assert "note: pretrain has no use for text-column, seeds\n" in shared.err
    assert "note: dist-master-port counts only together with ddp" in shared.err
    assert shared.answer["protocol"].endswith("15% of the ordinary tokens masked, 80/10/10, seed 0; vocabulary of 400")
    assert 0 < shared.answer["floor/unigram"] < 1 < shared.answer["floor_loss/unigram"]
    log = (Path(shared.answer["run"]) / "logs" / "log.txt").read_text()
    assert re.match(r"settings: .*\nmodel: .*\ndata: .*\ntraining: .*\nfloors on the validation set: ", log)
    used = ["--optimizer", "muon", "--muon-learning-rate", 0.01, "--schedule", "trapezoid", "--cooldown", 0.3]
    assert "counts only" not in bertling("pretrain", *SMALL, "--base-dir", tmp_path, "--max-iters", 1, *used).err


def test_an_answer_that_nobody_takes_is_no_fault(world: World) -> None:
    words = [sys.executable, "-m", "bertling", "evaluate", "--cp", world.classifier, "--data", world.dev]
    done = subprocess.run(f"{shlex.join(map(str, words))} >&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_answer_does_not_depend_on_what_a_cluster_sets(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["evaluate", "--cp", world.classifier, "--data", world.dev, "--json"]
    alone = bertling(*asked).answer
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bertling(*asked).answer == alone
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE: must be whole numbers" in bertling("pretrain", *SMALL, "--base-dir", world.base).error


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(world: World, encoding: str) -> None:
    said = bertling("classify", "--cp", world.classifier, "good \U0001f600", "--json", encoding=encoding)
    assert said.answer["text"] == "good \U0001f600"


def test_a_summary_of_a_checkpoint_takes_no_other_shape(world: World) -> None:
    assert "leave them out" in bertling("summary", "--cp", world.mlm, "--preset", "bert").error
    assert bertling("summary", "--cp", world.mlm).status == 0


def test_a_path_that_a_shell_did_not_know_is_missed(tmp_path: Path) -> None:
    assert "a path is missing" in bertling("vocab", "-i", TEXT, "-o", "", "--size", 100, cwd=tmp_path).error
    assert not list(tmp_path.iterdir())


def test_ctrl_c_waits_while_libraries_load() -> None:
    heard = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs behind it ignore it
    try:
        with unbroken():
            signal.raise_signal(signal.SIGINT)
            heard = True
        pytest.fail("it never came")
    except KeyboardInterrupt:
        assert heard
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_host_no_launch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    words = ["pretrain", *SMALL, "--base-dir", world.base, "--ddp", "--dist-master-addr", "no host"]
    assert "dist-master-addr = no host: no such host" in bertling(*words).error
