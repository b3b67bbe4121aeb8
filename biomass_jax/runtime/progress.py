"""How far a map is: a bar on a terminal or in a notebook, a line every ten seconds in a log."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """Counts the chips (tiles) of one map, or other units; use as a context manager around its prediction.

    Speed is measured from the first chips on: before them programs are compiled, which says nothing of the rest.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        terminal: bool | None = None,
        unit: str = "chip",
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`terminal` None asks standard error, or is a notebook; `every` is seconds between lines where it is none."""
        self._name = name
        self._unit = unit
        self._total = total
        self._done = 0
        self._every = every
        self._clock = clock
        self._reported = clock()
        self._began: float | None = None  # when the first chips were done
        self._first = 0  # how many those were
        self._bar: Any = None
        if sys.stderr.isatty() or in_notebook() if terminal is None else terminal:
            # the plain bar in notebooks too: that of tqdm.notebook needs ipywidgets
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def advance(self, chips: int) -> None:
        """Note that `chips` more are done."""
        self._done += chips
        now = self._clock()
        if self._began is None:
            self._began, self._first = now, self._done
            if self._bar is not None:  # its speed begins anew here
                self._bar.initial = self._bar.n = self._bar.last_print_n = self._done
                self._bar.start_t = self._bar.last_print_t = time.time()
                self._bar.refresh()
        elif self._bar is not None:
            self._bar.update(chips)
        elif now - self._reported >= self._every and self._done < self._total:
            self._reported = now
            rate = (self._done - self._first) / (now - self._began)
            left = (self._total - self._done) / rate if rate else float("inf")
            log.info(
                "%s: %d of %d %ss, %.1f %ss/s, %s left",
                *(self._name, self._done, self._total, self._unit, rate, self._unit, duration(left)),
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter's, which shows standard error, and a bar in it, though it is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
