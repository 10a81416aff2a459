"""docs/anatomy.md: what follows its prompts runs, and prints what it says; the drawing agrees."""

import doctest
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "anatomy.md"


def test_the_walk_through_the_model_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the picture that it draws
    lines = re.sub(r"^```.*$", "", PAGE.read_text(), flags=re.MULTILINE)
    walk = doctest.DocTestParser().get_doctest(lines, {}, PAGE.name, str(PAGE), 0)
    said: list[str] = []
    with torch.enable_grad():  # it turns gradients off and on
        failed, tried = doctest.DocTestRunner().run(walk, out=said.append)
    assert not failed, "".join(said)
    assert tried > 30
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    answer = re.findall(r"^4 \['(in .*)'\]$", lines, flags=re.MULTILINE)[0].replace("', '", ", ")
    assert f">{answer}<" in (PAGE.parent / "images" / "anatomy.svg").read_text()
