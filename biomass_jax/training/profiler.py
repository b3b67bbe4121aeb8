"""A trace of some steps of a run, which TensorBoard and Perfetto open."""

import logging
from pathlib import Path

import jax

from biomass_jax.errors import ProfileError

log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps START to STOP (not included) of `config.profile = 'START:STOP'` into `profile/`."""

    def __init__(self, steps: str | None, folder: Path) -> None:
        """Read the range; None = no trace.

        Raises:
            ProfileError: not `START:STOP` with 0 <= START < STOP.
        """
        self._folder, self._running = folder, False
        self._start = self._stop = -1
        if steps:
            first, colon, last = steps.partition(":")
            if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
                raise ProfileError(f"config.profile is {steps!r}; expected START:STOP, two numbers of steps, as 10:20")
            self._start, self._stop = int(first), int(last)

    def after_step(self, step: int) -> None:
        """Begin or end the trace where `step` steps have been taken."""
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step >= self._stop and self._running:
            self.close()

    def close(self) -> None:
        """End a trace that is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("trace of steps %d to %d: %s", self._start, self._stop, self._folder)
