"""Settings: the seed's files run unchanged, every fault is one line, and the later value wins."""

from pathlib import Path
from typing import Any

import pytest

from bertling.files import BertlingError
from bertling.settings import Settings, default_files, parse_settings, read_ini, resolve

PRETRAINING = """\
task-type = mlm
seq-len = 128
batch-size = 100
val-interval = 100
d-model = 768
heads = 12
n-layer = 6
dropout = 0.35

async-to-device: true
fused-adamw: true
compile: true

learning-rate = 1.0e-3
min-learning-rate = 5e-5
warmup-iters = 1000
lr-decay-iters = 45_000
max-iters = 60_000
weight-decay = 0.01

case = dickens # TODO: rename
base-dir = wiki
# supports round-robin of datasets
dataset-pattern = train_weke_128_*.msgpack
val-dataset-pattern = val_weke_128_*.msgpack
# DDP
dist-master-addr = 127.0.0.1
dist-master-port = 12233
# misc
max-checkpoints = 1
wandb = false
"""
FINE_TUNING = """\
task-type = sst2
seq-len = 128
batch-size = 64
val-interval = 200
d-model = 768
heads = 12
n-layer = 6
dropout = 0.0

async-to-device: true
fused-adamw: true
compile: true

learning-rate = 6e-5
min-learning-rate = 1e-7
warmup-iters = 300
lr-decay-iters = 8000
max-iters = 10000
weight-decay = 0.02

case = dickens # TODO: rename
base-dir = wiki
# DDP
dist-master-addr = 127.0.0.1
dist-master-port = 12233
# misc
max-checkpoints = 1
wandb = false
"""
SHARED: dict[str, Any] = {
    "seq_len": 128,
    "d_model": 768,
    "heads": 12,
    "n_layers": 6,
    "async_to_device": True,
    "fused_adamw": True,
    "compile": "true",
    "case": "dickens",
    "base_dir": Path("wiki"),
    "dist_master_addr": "127.0.0.1",
    "dist_master_port": 12233,
    "max_checkpoints": 1,
    "wandb": False,
}
EXPECTED: dict[str, dict[str, Any]] = {
    "pretrain": SHARED
    | {
        "task_type": "mlm",
        "batch_size": 100,
        "val_interval": 100,
        "dropout": 0.35,
        "learning_rate": 1e-3,
        "min_learning_rate": 5e-5,
        "warmup_iters": 1000,
        "lr_decay_iters": 45_000,
        "max_iters": 60_000,
        "weight_decay": 0.01,
        "dataset_pattern": "train_weke_128_*.msgpack",
        "val_dataset_pattern": "val_weke_128_*.msgpack",
    },
    "finetune": SHARED
    | {
        "task_type": "sst2",
        "batch_size": 64,
        "val_interval": 200,
        "dropout": 0.0,
        "learning_rate": 6e-5,
        "min_learning_rate": 1e-7,
        "warmup_iters": 300,
        "lr_decay_iters": 8000,
        "max_iters": 10_000,
        "weight_decay": 0.02,
    },
}


def write(folder: Path, text: str | bytes, name: str = "config.ini") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(folder: Path, text: str | bytes, command: str = "pretrain") -> str:
    """The one line that a settings file is refused with, less its path."""
    path = write(folder, text)
    with pytest.raises(BertlingError) as caught:
        resolve(command, [path], {})
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path}: ", "")


@pytest.mark.parametrize(("command", "text"), [("pretrain", PRETRAINING), ("finetune", FINE_TUNING)])
def test_the_files_of_the_seed_load_unchanged(tmp_path: Path, command: str, text: str) -> None:
    settings, explicit = resolve(command, [write(tmp_path, text)], {})
    expected = EXPECTED[command]
    assert explicit == expected.keys()
    for name, value in expected.items():
        assert (name, getattr(settings, name)) == (name, value)
        assert type(getattr(settings, name)) in (type(value), type(Path()))


def test_what_is_not_given_has_the_defaults_of_its_command() -> None:
    pretraining, finetuning = resolve("pretrain", [], {})[0], resolve("finetune", [], {})[0]
    assert (pretraining.preset, pretraining.optimizer, pretraining.schedule) == ("modern", "adamw", "cosine")
    assert (pretraining.task_type, pretraining.batch_size, pretraining.dropout) == ("mlm", 64, 0.0)
    assert (finetuning.task_type, finetuning.batch_size, finetuning.dropout) == ("sst2", 32, 0.1)
    assert pretraining.warmup_iters is pretraining.lr_decay_iters is pretraining.max_iters is None


@pytest.mark.parametrize(
    "line",
    ["n-layers = 3", "n-layer: 3", "n_layer = 3", "N-Layers=3", "num-hidden-layers = 3", "num_hidden_layers : 3  # x"],
)
def test_other_spellings_mean_the_same(tmp_path: Path, line: str) -> None:
    assert read_ini(write(tmp_path, f"# a comment\n; another\n\n{line}\n")) == {"n_layers": 3}


def test_hugging_faces_names_are_known(tmp_path: Path) -> None:
    text = "hidden-size = 64\nnum_attention_heads = 4\nhidden_dropout_prob = 0.1\nmax-steps = 1_000\n"
    assert read_ini(write(tmp_path, text)) == {"d_model": 64, "heads": 4, "dropout": 0.1, "max_iters": 1000}


@pytest.mark.parametrize("header", ["[settings]\n", "[DEFAULT]\n", "[model]\n"])
def test_section_headers_a_bom_and_windows_line_ends_do_no_harm(tmp_path: Path, header: str) -> None:
    text = f"\ufeff{header}heads = 4\n[data]\nseq-len = 64\n".replace("\n", "\r\n")
    assert read_ini(write(tmp_path, text)) == {"heads": 4, "seq_len": 64}


def test_a_sign_within_a_value_is_no_comment(tmp_path: Path) -> None:
    assert read_ini(write(tmp_path, "case = c#;100%\n")) == {"case": "c#;100%"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig-rate = 1", "unknown setting 'learnig-rate'; did you mean learning-rate?"),
        ("warmup_iter = 1", "unknown setting 'warmup_iter'; did you mean warmup-iters?"),
        ("zzz = 1", "unknown setting 'zzz'; bertling pretrain --help lists them all"),
        ("heads = four", "heads = four: must be a whole number"),
        ("heads =", "heads = : must be a whole number"),
        ("heads = 2.5", "heads = 2.5: must be a whole number"),
        ("heads = 0", "heads = 0: must be at least 1"),
        ("learning-rate = fast", "learning-rate = fast: must be a number"),
        ("learning-rate = 0", "learning-rate = 0: must be above 0"),
        ("learning-rate = nan", "learning-rate = nan: must be a finite number"),
        ("max-minutes = inf", "max-minutes = inf: must be a finite number"),
        ("dropout = 1", "dropout = 1: must be at most 0.99"),
        ("wandb = maybe", "wandb = maybe: must be true or false"),
        ("optimizer = moun", "optimizer = moun: must be one of adamw, muon; did you mean muon?"),
        ("preset = gpt", "preset = gpt: must be one of modern, bert, distilbert, seed"),
        ("base-dir =", "base-dir = : a path is missing"),
        ("run-id = ../x", "run-id = ../x: a plain folder name, please"),
        ("seed = 1\nheads = 2\nseed = 2", "line 3: seed is given twice: keep one"),
        ("n-layers = 2\nnum-hidden-layers = 2", "n-layers is given twice (as 'num-hidden-layers' too): keep one"),
        ("[a]\nheads = 2\n[a]", "line 3: [a] is given twice: keep one"),
        ("heads = 2\n  seq-len = 64", "heads: the line below it is indented: begin each key at the line's start"),
        ("heads = 2\nplease", "line 2: not of the form 'key = value': mend or remove it"),
        (b"case = caf\xe9", "not UTF-8 text (byte 10): save it as UTF-8"),
    ],
)
def test_a_fault_is_one_line_that_says_what_to_do(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d-model = 64\nheads = 5", "heads = 5 does not divide d-model = 64: choose heads that do"),
        ("warmup-iters = 20\nmax-iters = 10", "warmup-iters = 20 is over max-iters = 10: lower warmup-iters or raise"),
        ("lr-decay-iters = 20\nmax-iters = 10", "lr-decay-iters = 20 is over max-iters = 10"),
        ("lr-decay-iters = 20\nwarmup-iters = 30", "warmup-iters = 30 is over lr-decay-iters = 20"),
        ("learning-rate = 1e-4\nmin-learning-rate = 1e-3", "min-learning-rate = 0.001 is over learning-rate = 0.0001"),
        ("max-minutes = 5\nwarmup-iters = 30", "warmup-iters and lr-decay-iters count steps, but max-minutes ends"),
        ("train-input = a.tsv", "train-input and val-input go together: give both or neither"),
    ],
)
def test_values_that_cannot_hold_together_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


def test_only_values_given_explicitly_conflict() -> None:
    assert resolve("pretrain", [], {"max_iters": 1})[0].warmup_iters is None
    assert resolve("pretrain", [], {"warmup_iters": 10**6})[0].max_iters is None
    assert resolve("pretrain", [], {"max_minutes": 5.0, "max_iters": 50, "warmup_iters": 5})[0].max_minutes == 5


def test_a_task_type_that_disagrees_names_the_right_command(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, FINE_TUNING) == "task-type = sst2 goes with 'bertling finetune', not with 'bertling pretrain'"
    )
    assert refusal(tmp_path, PRETRAINING, "finetune").endswith(
        "mlm goes with 'bertling pretrain', not with 'bertling finetune'"
    )


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match=r"nowhere\.ini: no such file or folder"):
        resolve("pretrain", [tmp_path / "nowhere.ini"], {})


def test_the_later_file_wins_and_flags_win_over_both(tmp_path: Path) -> None:
    write(tmp_path, "heads = 2\nseq-len = 64\nseed = 1\n")
    write(tmp_path, "seq-len = 32\nseed = 2\n", "local_config.ini")
    files = default_files(tmp_path)
    assert [path.name for path in files] == ["config.ini", "local_config.ini"]
    settings, explicit = resolve("pretrain", files, {"seed": 3})
    assert (settings.heads, settings.seq_len, settings.seed) == (2, 32, 3)
    assert explicit == {"heads", "seq_len", "seed"}


@pytest.mark.parametrize(("command", "text"), [("pretrain", PRETRAINING), ("finetune", FINE_TUNING)])
def test_settings_come_back_from_their_own_file(tmp_path: Path, command: str, text: str) -> None:
    settings, _ = resolve(command, [write(tmp_path, text)], {"run_id": "x", "min_learning_rate": 1e-7})
    assert resolve(command, [write(tmp_path, settings.to_ini(), "again.ini")], {})[0] == settings
    assert resolve("pretrain", [write(tmp_path, Settings().to_ini())], {})[0] == Settings()


@pytest.mark.parametrize("value", ["run # 3", "a\nb", "#3", "a\t#3", "caf\udce9"])
def test_a_flag_that_a_settings_file_could_not_hold_is_refused(value: str) -> None:
    with pytest.raises(BertlingError, match=r"command line: case = \S+ ?.*: a value holds no line end, and no '#'"):
        parse_settings({"case": value})


def test_every_one_of_several_seeds_is_within_the_limit() -> None:
    assert Settings(seed=2**31 - 3, seeds=3).seeds == 3
    with pytest.raises(BertlingError, match=r"seed = 2147483646: the last of 3 would be over 2147483647"):
        Settings(seed=2**31 - 2, seeds=3)


def test_flags_as_text_are_checked_like_a_file() -> None:
    assert parse_settings({"n_layer": "2", "compile": "True"}) == Settings(n_layers=2, compile="true")
    with pytest.raises(BertlingError, match="command line: unknown setting 'hed'; did you mean heads"):
        parse_settings({"hed": "1"})


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.ini")), ids=lambda p: p.name)
def test_each_file_in_configs_loads(path: Path) -> None:
    task = read_ini(path).get("task_type", "mlm")
    settings, explicit = resolve("pretrain" if task == "mlm" else "finetune", [path], {})
    assert explicit
    assert settings.base_dir == Path("wiki")
