"""How sure a model is of a pixel, by its own word or by how its answers scatter; functions of images on the device.

Ways, by name:

- `model`: what the model gives itself: a spread beside its mean, quantiles, or the scatter of an ensemble's members.
- `dropout`: channels of the head's features are dropped as in training, several times (Gal and Ghahramani, Dropout as a
  Bayesian approximation, 2016). The encoder runs once. Nothing need be trained for it.
- `drop_path`: whole branches of the encoder's blocks are dropped, too, so that all of it runs for each sample.
- `symmetries`: the image is turned and mirrored in the eight ways that leave a square a square, and maps turned back.

What is dropped is the same for every image and tile: a sample is one thinned model, and its map has no seams. A
variance is the mean of the samples' own variances, where the model gives one, plus the variance of their means
(Lakshminarayanan et al., Simple and scalable predictive uncertainty estimation using deep ensembles, 2017).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from biomass_jax.errors import PredictionError
from biomass_jax.models.ensemble import mixture

WAYS = ("none", "model", "dropout", "drop_path", "symmetries")
MEAN = ("mean",)
Model = Any  # `BiomassModel`, `BiomassEnsemble`, or None where a function stands in its place: Flax types no `apply`
Variables = Mapping[str, Any]
# (variables, z-scored float32 (B, H, W, bands)) -> (B, H, W), of a model with a spread (B, H, W, outputs)
ModelFunction = Callable[[Any, jax.Array], jax.Array]
SpreadFunction = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a map's uncertainty comes about.

    Attributes:
        way: one of `WAYS`.
        samples: how many for `dropout` and `drop_path`.
        seed: of their draws.

    Raises:
        PredictionError: an unknown way, or fewer than two samples.
    """

    way: str = "none"
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise PredictionError(f"uncertainty is {self.way!r}; expected one of {', '.join(WAYS)}")
        if type(self.samples) is not int or self.samples < 2:
            raise PredictionError(f"samples is {self.samples!r}; expected a whole number, 2 or more")

    def about(self) -> dict[str, Any]:
        """What values depend on: plain fields, `samples` and `seed` only where something is drawn."""
        drawn = {"samples": self.samples, "seed": self.seed} if self.way in ("dropout", "drop_path") else {}
        return {"way": self.way, **drawn}


def own_channels(module: Model) -> tuple[str, ...]:
    """What a model gives of a pixel by itself: `mean`, and `sd`, or `lo` and `hi`.

    `module` is None for a function in a model's place, which gives means.
    """
    outputs: tuple[str, ...] = getattr(module, "outputs", MEAN)
    if len(outputs) == 1:
        return MEAN
    return ("mean", "sd") if outputs[1] in ("log_scale", "sd") else ("mean", "lo", "hi")


def channels_of(module: Model, spread: Spread) -> tuple[str, ...]:
    """What `with_spread` gives of a pixel.

    Raises:
        PredictionError: the model can't be asked in this way.
    """
    own = own_channels(module)
    if spread.way == "none":
        return MEAN
    if spread.way == "model" and own == MEAN:
        raise PredictionError(
            "uncertainty is 'model', but the model gives a mean alone; choose dropout, drop_path or symmetries, or "
            "train a spread on its features (configs/spread.py)"
        )
    if spread.way == "model":
        return own
    if "lo" in own:
        raise PredictionError(
            f"uncertainty is {spread.way!r}, but the model gives quantiles, which have no variance to add to; choose "
            "'model'"
        )
    if spread.way in ("dropout", "drop_path") and hasattr(module, "members"):
        raise PredictionError(
            f"uncertainty is {spread.way!r}, but the model is an ensemble, whose members scatter by themselves; choose "
            "'model' or 'symmetries'"
        )
    if spread.way == "dropout" and not getattr(module, "head_dropout", 0.0):
        raise PredictionError(
            "uncertainty is 'dropout', but the model's head drops nothing (head_dropout is 0); choose symmetries"
        )
    if spread.way == "drop_path" and not (
        getattr(module, "head_dropout", 0.0) or getattr(module, "drop_path_rate", 0.0)
    ):
        raise PredictionError(
            "uncertainty is 'drop_path', but the model drops nothing (drop_path_rate and head_dropout are 0); choose "
            "symmetries"
        )
    return ("mean", "sd")


def with_spread(
    module: Model,
    spread: Spread,
    *,
    stub: ModelFunction | None = None,
    stage: int | None = None,
    one_by_one: bool = False,
) -> SpreadFunction:
    """A model that says how sure it is.

    Args:
        module: `BiomassModel` or `BiomassEnsemble`; None where `stub` is given.
        spread: how.
        stub: another model, that gives (B, H, W) means.
        stage: of the encoder, whose map is wanted too.
        one_by_one: decoders and heads behind a shared encoder take one image at a time: for a CPU, which spends much of
            their time on fresh memory. Not those of a single model, whose mean keeps the bits of a plain map.

    Returns:
        (variables, z-scored (B, H, W, bands)) -> float32 (B, H, W) of a mean alone, else (B, H, W, C) with the channels
        of `channels_of`, and the stage's map (B, h, w, features) of the images as they are, or None. The mean is the
        model's own answer, of symmetries the mean of the eight.

    Raises:
        PredictionError: see `channels_of`.
    """
    channels = channels_of(module, spread)
    plain = stub or (lambda variables, x: module.apply(variables, x))

    def answer(variables: Variables, x: jax.Array) -> jax.Array:
        values = plain(variables, x)
        return values[..., 0] if channels == MEAN != own_channels(module) else values

    def run(variables: Variables, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        size = x.shape[1], x.shape[2]
        if stage is None and spread.way in ("none", "symmetries"):
            maps = map_of_stage = None
        else:
            maps = module.apply(variables, x, method="encode")
            map_of_stage = None if stage is None else first_encoders(maps[stage])
        if channels == MEAN:
            return answer(variables, x), map_of_stage
        if spread.way == "symmetries":
            return _of_symmetries(lambda one: _canonical(module, plain(variables, one)), x), map_of_stage
        if one_by_one and getattr(module, "shared_encoder", False):

            def of_one(image: list[jax.Array]) -> jax.Array:
                found = module.apply(variables, [one[None] for one in image], method="decode")
                return _canonical(module, module.apply(variables, found, size, method="estimate"))[0]

            return jax.lax.map(of_one, maps), map_of_stage
        features = module.apply(variables, maps, method="decode")
        values = _canonical(module, module.apply(variables, features, size, method="estimate"))
        if spread.way != "model":
            thinned = (lambda key: features) if spread.way == "dropout" else _without_branches(module, variables, x)
            sd = _sampled(module, spread, variables, size, thinned)
            values = jnp.stack([values[..., 0], sd], axis=-1)
        return values, map_of_stage

    return run


def first_encoders(map_of_stage: jax.Array) -> jax.Array:
    """(B, h, w, C), or (members, B, h, w, C) of an ensemble without a shared encoder -> that of the first encoder."""
    return map_of_stage[0] if map_of_stage.ndim == 5 else map_of_stage


def _canonical(module: Model, outputs: jax.Array) -> jax.Array:
    """A model's outputs (B, H, W) or (B, H, W, C) as mean, and sd or lo and hi, as labels: (B, H, W, 1 to 3)."""
    if own_channels(module) == MEAN:
        return outputs[..., None]
    if module.outputs[1] != "log_scale":
        return jnp.stack([outputs[..., 0], outputs[..., 1], outputs[..., -1]][: len(own_channels(module))], axis=-1)
    # Laplace's standard deviation is the root of 2 times its scale.
    factor = 2.0**0.5 if module.spread == "laplace" else 1.0
    return jnp.stack([outputs[..., 0], factor * jnp.exp(outputs[..., 1])], axis=-1)


def _mixed(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and sd of samples (S, B, H, W, 1 or 2); the same bits in whatever order they come."""
    variances = jnp.sort(jnp.square(values[..., 1]), axis=0) if values.shape[-1] > 1 else 0.0
    return mixture(jnp.sort(values[..., 0], axis=0), variances)


def _of_symmetries(model: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Mean and sd (B, H, W, 2) of the eight maps, `model` giving (B, H, W, 1 or 2)."""
    ways = list(itertools.product((False, True), repeat=3))
    alike = [ways] if x.shape[1] == x.shape[2] else [ways[:4], ways[4:]]
    parts = []
    for some in alike:
        # One after another in one loop: the program isn't eight times as long, nor the memory eight times as much.
        maps = jax.lax.map(model, jnp.stack([transformed(x, symmetry) for symmetry in some]))
        parts += [restored(one, symmetry) for one, symmetry in zip(maps, some, strict=True)]
    return jnp.stack(_mixed(jnp.stack(parts)), axis=-1)


def transformed(x: jax.Array, symmetry: Sequence[bool]) -> jax.Array:
    """Images (B, H, W, ...): rows and columns swapped, then turned upside down, then left to right, as each says."""
    swapped, upside_down, mirrored = symmetry
    x = jnp.swapaxes(x, 1, 2) if swapped else x
    x = x[:, ::-1] if upside_down else x
    return x[:, :, ::-1] if mirrored else x


def restored(y: jax.Array, symmetry: Sequence[bool]) -> jax.Array:
    """Undo `transformed` on maps (B, H', W', ...)."""
    swapped, upside_down, mirrored = symmetry
    y = y[:, :, ::-1] if mirrored else y
    y = y[:, ::-1] if upside_down else y
    return jnp.swapaxes(y, 1, 2) if swapped else y


def _sampled(
    module: Model,
    spread: Spread,
    variables: Variables,
    size: tuple[int, int],
    features: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Sd (B, H, W) of samples; `features(key)` gives the head's (B, h, w, C), of which channels are dropped."""
    keys = jax.random.split(jax.random.key(spread.seed), (spread.samples, 2))

    def sample(pair: jax.Array) -> jax.Array:
        found = features(pair[0])
        keep = 1.0 - module.head_dropout
        kept = jax.random.bernoulli(pair[1], keep, found.shape[-1:])
        thinned = jnp.where(kept, found / keep, jnp.zeros((), found.dtype))
        return _canonical(module, module.apply(variables, thinned, size, method="estimate"))

    return _mixed(jax.lax.map(sample, keys))[1]


def _without_branches(module: Model, variables: Variables, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """key -> the head's features (B, h, w, C) of an encoder that has lost some of its branches."""

    def features(key: jax.Array) -> jax.Array:
        def of_one(image: jax.Array) -> list[jax.Array]:  # one by one, with one key: all images lose the same branches
            drawn = {"drop_path": key}
            found: list[jax.Array] = module.apply(variables, image[None], train=True, method="encode", rngs=drawn)
            return [one[0] for one in found]

        decoded: jax.Array = module.apply(variables, jax.vmap(of_one)(x), method="decode")
        return decoded

    return features
