"""Many maps: each is begun while the one before is finished, and one that fails doesn't stop the others."""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from biomass_jax.data import raster
from biomass_jax.errors import BundleError
from biomass_jax.prediction import maps
from biomass_jax.prediction.maps import MapResult

log = logging.getLogger(__name__)

Finish = Callable[[], MapResult]  # waits for the device where need be, writes the file; called once, in any thread
Failure = tuple[str, Exception]  # the input's name, what went wrong
Made = TypeVar("Made")


def make_maps(
    items: Sequence[raster.InputItem], begin: Callable[[raster.InputItem], Finish]
) -> tuple[list[MapResult], list[Failure]]:
    """Make a map of each input.

    Args:
        items: the inputs.
        begin: starts a map in this thread; what it returns is called in another one, so that reading the next image
            and computing its map need not wait for the file of this one. At most two are on their way.

    Returns:
        The maps, and what failed; both in the order of the inputs.

    Raises:
        BundleError: damaged weights; no other image would fare better.
    """
    outcomes: list[Future[MapResult | Failure] | Failure] = []
    running: list[Future[MapResult | Failure]] = []
    with ThreadPoolExecutor(1, "map finisher") as finisher:
        for item in items:
            begun = _attempt(item, functools.partial(begin, item))
            if isinstance(begun, tuple):
                outcomes.append(begun)
                continue
            finishing = finisher.submit(_attempt, item, begun)
            outcomes.append(finishing)
            wait(running)
            running = [finishing]
    results: list[MapResult] = []
    failures: list[Failure] = []
    for outcome in outcomes:
        found = outcome.result() if isinstance(outcome, Future) else outcome
        if isinstance(found, MapResult):
            results.append(found)
        else:
            failures.append(found)
    return results, failures


def _attempt(item: raster.InputItem, step: Callable[[], Made]) -> Made | Failure:
    """What a step gives, or its error, told at once."""
    try:
        return step()
    except BundleError:
        raise
    except Exception as error:
        why = maps.reason(item.name, error)
        log.error("%s: failed: %s", item.name, why, exc_info=not maps.is_readable(error))
        return item.name, error
