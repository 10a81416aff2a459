"""A progress line with time left on standard error, for work that is not training."""

import sys
import time
from types import TracebackType
from typing import Self

QUIET_SECONDS = 10.0
"""Where nobody watches (a file, a pipe), a plain line is written this often."""


class ByteProgress:
    """Shows how many of the bytes to read are done; call it with (done, total). Silent in the first two seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.shown = what, time.monotonic(), 0.0
        self.open_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.open_line:
            sys.stderr.write("\n")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self.began < 2 or now - self.shown < (0.2 if terminal else QUIET_SECONDS) or not 0 < done <= total:
            return
        self.shown = now
        left = (now - self.began) * (total - done) / done
        line = f"{self.what}: {100 * done // total}% of {total / 1e6:,.1f} MB, {clock(left)} left"
        sys.stderr.write(f"\r\x1b[2K{line}" if terminal else line + "\n")
        sys.stderr.flush()
        self.open_line = terminal


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
