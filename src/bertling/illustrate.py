"""Show predictions for masked tokens in the running text, and the original text under it, plain and in colour."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bertling.files import atomic_write

# Backgrounds that differ in brightness too, and stay green and yellow in a terminal of 16 colours.
RIGHT_STYLE = "#000000 on #66bb6a"
WRONG_STYLE = "#000000 on #ffb347"
HIDDEN_TOKENS = frozenset({"[CLS]", "[SEP]", "[PAD]"})
NO_SPACE_BEFORE = frozenset(".,;:!?)]}%")
NO_SPACE_AFTER = frozenset("([{$")
CONTRACTED = frozenset({"s", "t", "d", "m", "re", "ve", "ll"})


@dataclass(frozen=True)
class Illustration:
    """A text with its predictions; `plain` writes a wrong one as /~this~/, `colour` strikes it through on orange."""

    plain: str
    colour: Text
    correct: int
    total: int


def illustrate(
    tokens: Sequence[str], positions: Sequence[int], predicted: Sequence[str], original: Sequence[str]
) -> Illustration:
    """Illustrate the predictions for one sequence.

    `tokens` is the whole sequence of word pieces, masked or not; `positions` are the indices of the masked places in
    it, and `predicted` and `original` hold one token for each of them.
    """
    right = {place: guess == truth for place, guess, truth in zip(positions, predicted, original, strict=True)}
    guesses = dict(zip(positions, predicted, strict=True))
    truths = dict(zip(positions, original, strict=True))
    correct, total = sum(right.values()), len(right)
    count = f"{correct} out of {total}" + (f", {round(100 * correct / total)} %" if total else "")
    above, below = _running_text(tokens, guesses, right, strike=True), _running_text(tokens, truths, right)
    # Terminals that cannot strike through still need to tell right from wrong in the plain form.
    plain_above = _running_text(tokens, {k: v if right[k] else _tilde(v) for k, v in guesses.items()}, right)
    return Illustration(
        plain=f"{plain_above.plain}\n\n{below.plain}\n\n{count}",
        colour=Text.assemble(above, "\n\n", below, "\n\n", (count, "bold")),
        correct=correct,
        total=total,
    )


def to_svg(illustration: Illustration, path: Path, *, width: int = 100) -> None:
    """Write the coloured form as an SVG picture of a terminal, `width` columns wide."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(illustration.colour)
    svg = console.export_svg(title=f"{illustration.correct} out of {illustration.total}", unique_id="bertling")
    # rich refers to fonts on the network: a picture must not fetch anything, and any monospaced font will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    atomic_write(path, svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace"))


def _tilde(token: str) -> str:
    return f"##~{token[2:]}~" if token.startswith("##") else f"~{token}~"


def _sticks(tokens: Sequence[str], place: int) -> bool:
    """Whether people write no space before this token: closing punctuation, and both parts of 's."""
    before, token, after = tokens[place - 1 : place], tokens[place], tokens[place + 1 : place + 2]
    if token == "'":
        return bool(after) and after[0] in CONTRACTED
    return token in NO_SPACE_BEFORE or (token in CONTRACTED and list(before) == ["'"])


def _running_text(
    tokens: Sequence[str], shown: Mapping[int, str], right: Mapping[int, bool], *, strike: bool = False
) -> Text:
    """Join word pieces to words and mark the places in `shown`, whose token replaces the one in `tokens`."""
    text = Text()
    for place, token in enumerate(tokens):
        marked = place in shown
        if token in HIDDEN_TOKENS and not marked:
            continue
        piece = shown.get(place, token)
        inside_word = piece.startswith("##") and len(piece) > 2
        joined = inside_word if marked else inside_word or _sticks(tokens, place)
        if text and not joined and text.plain[-1] not in NO_SPACE_AFTER:
            text.append(" ")
        word = piece[2:] if inside_word else piece
        if not marked:
            text.append(word)
        else:
            wrong = f"{'strike ' if strike else ''}{WRONG_STYLE}"
            text.append(f"/{word}/", style=RIGHT_STYLE if right[place] else wrong)
    return text
