"""A bundle that is usable before its weights are read, so that compiling and reading overlap."""

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from biomass_jax import bundle as bundles


class OpeningBundle:
    """A `Bundle` whose `variables` wait for a thread that reads them; everything else is there at once."""

    def __init__(self, path: str | os.PathLike[str], sharding: Any) -> None:
        """Check `bundle.json` (BundleError here) and start to read the weights (BundleError from `variables`)."""
        self._described = bundles.Bundle(Path(path), bundles.read_meta(path), {})
        self._whole: Future[bundles.Bundle] = Future()
        threading.Thread(target=self._read, args=(path, sharding), name="bundle reader").start()

    def _read(self, path: str | os.PathLike[str], sharding: Any) -> None:
        try:
            self._whole.set_result(bundles.load(path, sharding))
        except BaseException as error:  # raised again where the variables are asked for
            self._whole.set_exception(error)

    @property
    def variables(self) -> dict[str, Any]:
        """The weights, once they are read."""
        return self._whole.result().variables

    def __getattr__(self, name: str) -> Any:
        return getattr(self._described, name)
