"""The English of the installation: the same each time, prose, within the limit, and read without importing anything."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bertling.files import BertlingError
from bertling.tools import quickstart_text
from bertling.tools.quickstart_text import collect_english

LIMIT = 600_000
PROGRAM = f"""
import hashlib, sys
heavy = {{"matplotlib", "scipy", "sympy", "torch", "turtle"}}
from bertling.tools.quickstart_text import collect_english
text = "\\0".join(collect_english({LIMIT}))
print(hashlib.sha256(text.encode()).hexdigest(), *(heavy & set(sys.modules)))
"""
DOCSTRING = """Return the mean of the values along the given axis.

    The values are summed first, and the sum is then divided by their number, which is a well-
    known method::

        total = sum(values) / the_number

    Parameters
    ----------
    axis : int, optional
        The axis along which the *mean* is taken, or ``None`` for all of the values at once.

    >>> mean([1, 2, 3])
    2 is what this prints and it is not prose.

    .. math:: this is the sum of all the values
    .. note:: See :func:`~statistics.mean` for the version that is not as fast as this one.

    =====  ======================================
    Name   This is the head of a table of values.
    =====  ======================================
    """
PROSE = [
    "Return the mean of the values along the given axis.",
    "The values are summed first, and the sum is then divided by their number, which is a well-known method:",
    "The axis along which the mean is taken, or None for all of the values at once.",
    "See statistics.mean for the version that is not as fast as this one.",
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return collect_english(LIMIT)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own, and no packages."""
    monkeypatch.setattr(quickstart_text, "PACKAGES", {})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def module(text: str) -> str:
    return f'"""{text}"""\n'


def test_same_text_in_another_process_and_nothing_is_imported(documents: list[str]) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    answer = subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True)
    assert answer.split() == [hashlib.sha256("\0".join(documents).encode()).hexdigest()]


def test_limit_is_respected_and_nearly_used(documents: list[str]) -> None:
    size = sum(len(document.encode()) for document in documents)
    assert 0.98 * LIMIT <= size <= LIMIT


def test_text_is_prose_without_duplicates(documents: list[str]) -> None:
    text = "\n".join(documents)
    assert sum(character.isalpha() for character in text) / len(text) > 0.75
    assert ">>>" not in text
    assert text.isascii()
    paragraphs = text.split("\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(paragraph.split()) >= 5 for paragraph in paragraphs)
    words = text.lower().split()
    assert words.count("the") / len(words) > 0.04


def test_only_the_prose_of_a_docstring_is_kept() -> None:
    seen: set[str] = set()
    assert list(quickstart_text._paragraphs([DOCSTRING], seen)) == PROSE
    assert list(quickstart_text._paragraphs([DOCSTRING], seen)) == []


def test_unreadable_sources_are_skipped(library: Path) -> None:
    (library / "good.py").write_text(module(PROSE[0]) + f"class A:\n    {module(PROSE[2])}")
    (library / "again.py").write_text(module(PROSE[0]))
    (library / "syntax.py").write_text(module(PROSE[1]) + "def (:\n")
    (library / "latin.py").write_bytes(module(PROSE[1] + " caf\xe9").encode("latin-1"))
    (library / "null.py").write_bytes(module(PROSE[1]).encode() + b"\0")
    (library / "gone.py").symlink_to(library / "nowhere.py")
    (library / "tests").mkdir()
    (library / "tests" / "test_a.py").write_text(module(PROSE[1]))
    assert sorted("\n".join(collect_english(150)).split("\n")) == sorted([PROSE[0], PROSE[2]])


def test_too_little_text_is_one_clear_line(library: Path) -> None:
    (library / "good.py").write_text(module(PROSE[0]))
    message = "gives only 51 bytes of English text, 500,000 are needed; install Python"
    with pytest.raises(BertlingError, match=message) as caught:
        collect_english(2_000_000)
    assert str(library) in str(caught.value)
    assert "\n" not in str(caught.value)
