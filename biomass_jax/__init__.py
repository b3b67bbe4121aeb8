"""Above-ground biomass maps from satellite images, in JAX."""

import os
from typing import TYPE_CHECKING, Any

from biomass_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from biomass_jax.prediction.predictor import Predictor


def load(path: str | os.PathLike[str], **settings: Any) -> "Predictor":
    """Open a model bundle for prediction on all local devices.

    Args:
        path: the bundle's folder, written by `python -m biomass_jax.convert` or by training.
        **settings: `Predictor`'s keyword arguments: batch_size, tile, stride, margin, dtype ...

    Returns:
        A predictor with `predict_array`, `predict_file` and `predict_dir`.

    Raises:
        BundleError: no bundle there, or one of another schema version.
    """
    # Here and not above: importing the package must not start JAX.
    from biomass_jax import bundle
    from biomass_jax.prediction.predictor import Predictor
    from biomass_jax.runtime.mesh import local_placement

    placement = local_placement()
    return Predictor(bundle.load(path, placement["replicated"]), **placement, **settings)
