"""Illustrated predictions: the running text, the marks, the count, and the picture."""

from pathlib import Path

import pytest
from rich.text import Text

from bertling.files import BertlingError
from bertling.illustrate import RIGHT_STYLE, WRONG_STYLE, Illustration, illustrate, to_svg

TOKENS = "[CLS] the [MASK] open ##ed in [MASK] ( for $ 5 ) , re ##bui [MASK] by the town ' s folk . [SEP] [PAD]".split()


@pytest.fixture
def example() -> Illustration:
    return illustrate(TOKENS, [2, 6, 15], ["house", "1924", "##lt"], ["station", "1924", "##lt"])


def styles(text: Text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_plain_form(example: Illustration) -> None:
    assert example.plain == (
        "the /~house~/ opened in /1924/ (for $5), rebui/lt/ by the town's folk.\n\n"
        "the /station/ opened in /1924/ (for $5), rebui/lt/ by the town's folk.\n\n"
        "2 out of 3, 67 %"
    )
    assert (example.correct, example.total) == (2, 3)


def test_colours_mark_right_and_wrong_at_the_same_places(example: Illustration) -> None:
    assert "~" not in example.colour.plain
    assert styles(example.colour) == [
        ("/house/", f"strike {WRONG_STYLE}"),
        ("/1924/", RIGHT_STYLE),
        ("/lt/", RIGHT_STYLE),
        ("/station/", WRONG_STYLE),
        ("/1924/", RIGHT_STYLE),
        ("/lt/", RIGHT_STYLE),
        ("2 out of 3, 67 %", "bold"),
    ]


def test_the_predicted_token_decides_whether_it_joins_its_word() -> None:
    shown = illustrate(["re", "[MASK]", "up"], [1], ["the"], ["##lt"])
    assert shown.plain.startswith("re /~the~/ up\n\nre/lt/ up\n\n0 out of 1, 0 %")
    assert illustrate(["go", "[MASK]", "up"], [1], ["##es"], ["on"]).plain.startswith("go/~es~/ up\n\ngo /on/ up")


def test_a_masked_comma_stands_apart_so_that_its_mark_is_seen() -> None:
    assert illustrate(["a", "[MASK]", "b"], [1], [","], [","]).plain.startswith("a /,/ b")


def test_special_tokens_go_unless_predicted_and_quotes_stand_alone() -> None:
    shown = illustrate(["[CLS]", "'", "[UNK]", "'", "[MASK]", "[SEP]"], [4], ["[SEP]"], ["s"])
    assert shown.plain.startswith("' [UNK] ' /~[SEP]~/\n\n' [UNK] ' /s/")


def test_nothing_masked() -> None:
    assert illustrate(["a"], [], [], []).plain == "a\n\na\n\n0 out of 0"


def test_markup_in_the_text_is_text(tmp_path: Path) -> None:
    shown = illustrate(["[", "bold", "]", "<", "&"], [], [], [])
    to_svg(shown, tmp_path / "a.svg")
    assert shown.colour.plain.startswith("[bold] < &")


def test_svg_needs_nothing_from_the_network_and_is_reproducible(tmp_path: Path, example: Illustration) -> None:
    to_svg(example, tmp_path / "a.svg")
    to_svg(example, tmp_path / "b.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    assert "url(http" not in svg
    assert "@font-face" not in svg
    assert "line-through" in svg
    assert "/house/" in svg


def test_svg_into_a_file_as_folder_is_one_line(tmp_path: Path, example: Illustration) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BertlingError, match="file"):
        to_svg(example, tmp_path / "file" / "a.svg")
