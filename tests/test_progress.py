"""The progress line: time left, quiet at first, a plain line now and then where nobody watches."""

import io
import sys

import pytest

from bertling.progress import ByteProgress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, calls: list[tuple[float, int, int]]) -> str:
    """Call it at these seconds with these bytes."""
    now = 0.0
    monkeypatch.setattr("bertling.progress.time.monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", stream)
    with ByteProgress("reading") as progress:
        for now, done, total in calls:  # noqa: B007
            progress(done, total)
    return stream.getvalue()


def test_a_file_gets_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [(1.0, 10, 100), (15.0, 25, 100), (16.0, 30, 100), (30.0, 50, 100), (31.0, 100, 100)]
    assert play(monkeypatch, io.StringIO(), calls) == (
        "reading: 25% of 0.0 MB, 0:45 left\nreading: 50% of 0.0 MB, 0:30 left\n"
    )


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = play(monkeypatch, Terminal(), [(4.0, 1_000_000, 2_000_000), (4.1, 1, 2), (5.0, 2_000_000, 2_000_000)])
    assert shown.split("\r\x1b[2K") == ["", "reading: 50% of 2.0 MB, 0:04 left", "reading: 100% of 2.0 MB, 0:00 left\n"]


def test_short_work_and_unknown_sizes_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(monkeypatch, Terminal(), [(0.5, 1, 2), (1.9, 2, 2), (30.0, 0, 0), (31.0, 3, 2)]) == ""


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600, 7325)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "2:02:05",
    ]
