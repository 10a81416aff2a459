"""The commands of the README, run in their order, made small by flags that they document."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import SMALL, TEXT, bertling, write_labelled

import bertling as package

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = next(block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "bertling vocab" in block)
COMMANDS = [shlex.split(line, comments=True) for line in BLOCK.splitlines()]
REDUCED = {
    "vocab": ["--size", "200"],
    "prepare": ["-m", "128", "--workers", "1"],
    "inspect": [],
    "plan": [*SMALL, "--probe-steps", "2", "--batch-size", "4"],
    "pretrain": [*SMALL, "--max-iters", "4", "--batch-size", "4"],
    "finetune": ["--train-input", "train.tsv", "--val-input", "dev.tsv", "--max-iters", "4", "--threads", "1"],
    "evaluate": [],
    "fill": [],
    "classify": [],
    "embed": [],
    "export": [],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command answered, by its name."""
    folder = tmp_path_factory.mktemp("readme")
    text = TEXT.read_text()
    (folder / "wiki.train.tokens").write_text(text * 3)
    (folder / "wiki.valid.tokens").write_text(text)
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_labelled(folder / "train.tsv", 40)
    write_labelled(folder / "dev.tsv", 20)
    found = {}
    for program, name, *words in COMMANDS:
        assert program == "bertling"
        ended = bertling(name, *words, *REDUCED[name], cwd=folder)
        assert ended.status == 0, f"{name}: {ended.err}"
        found[name] = ended.out
    model = package.load(folder / "wiki/runs/mlm")
    found["load"] = str(model.fill("she won the gold [MASK] at the olympic games .")[0]["masks"][0][0][0])
    return found


def test_every_command_of_the_readme_runs(answers: dict[str, str]) -> None:
    assert answers.keys() == {*REDUCED, "load"}
    assert "samples" in answers["prepare"]
    assert "tokens a second" in answers["plan"]
    assert "accuracy" in answers["evaluate"]
    assert "[MASK]:" in answers["fill"]
    assert answers["classify"].split("\t")[0] in {"0", "1"}
    assert "1 vectors of 32" in answers["embed"]
    assert "stock class: within" in answers["export"]
    assert answers["load"]


def test_the_first_two_commands_are_targets_of_the_makefile() -> None:
    first = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0]
    makefile = (ROOT / "Makefile").read_text()
    for line in first.splitlines():
        program, target = line.split("#")[0].split()
        assert program == "make"
        assert re.search(rf"^{target}: (install|\$\(VENV\)/weights)$", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_file_that_a_page_links_exists(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
