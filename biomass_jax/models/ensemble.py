"""Several biomass models as one: the mean and the standard deviation of the mixture of what they predict.

Lakshminarayanan et al., arXiv 1612.01474, section 2.4.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.errors import ArchitectureError
from biomass_jax.models.biomass import BiomassModel

MEMBER = "member_"  # and a number: the parameters of each

# Variance of each member's own distribution, from its `log_scale`.
_VARIANCES = {"gaussian": lambda log_sigma: jnp.exp(2 * log_sigma), "laplace": lambda log_b: 2 * jnp.exp(2 * log_b)}


def mixture(means: jax.Array, variances: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of an equal mixture: the variance is the variances' mean plus the means' variance.

    The means' variance is divided by their number k, not by k - 1: the mixture of these k distributions is what is
    predicted, they are no sample from which the spread of others would be estimated.

    Args:
        means: [k, ...] of the members.
        variances: [k, ...] of the members, or 0.

    Returns:
        [...] each. Members that agree to the bit give their own mean and a deviation of exactly 0 where `variances`
        are 0, since only differences from the first one are averaged.
    """
    differences = means - means[0]
    middle = differences.mean(0)
    variance = jnp.mean(variances + jnp.square(differences - middle), axis=0)
    positive = variance > 0
    # Where it is 0 the root's derivative would be infinite.
    return means[0] + middle, jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


class BiomassEnsemble(BiomassModel):
    """`members` models of one architecture, each with weights of its own, whose mixture is predicted.

    The other fields are those of each member. Parameters lie under `member_0`, `member_1` ... as in `BiomassModel`;
    with `shared_encoder` there is one `encoder` beside them, which runs once, and the members hold decoder and head.
    Only for predictions: members are trained one by one and then joined, see `join_variables`.
    """

    members: int = 2
    shared_encoder: bool = False

    def __post_init__(self) -> None:
        """Refuse what can't be an ensemble.

        Raises:
            ArchitectureError: no members, or members that predict quantiles.
        """
        if self.members < 1:
            raise ArchitectureError(f"architecture.members is {self.members}; expected 1 or more")
        if self.spread == "quantiles":
            raise ArchitectureError(
                "architecture.spread is 'quantiles' in an ensemble: the mean of quantiles is no quantile of the "
                "mixture; expected members with spread 'gaussian', 'laplace' or 'none'"
            )
        super().__post_init__()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a pixel is given, both as labels: the mixture's mean and standard deviation."""
        return ("mean", "sd")

    def setup(self) -> None:
        """Build the members, and the encoder that they share."""
        if self.shared_encoder:
            self.encoder = self.make_encoder()
        self.member = [self.make_member() for _ in range(self.members)]

    @nn.nowrap
    def make_member(self, **options: Any) -> BiomassModel:
        """One member as a model of its own; `options` are `name` and `parent`."""
        names = {field.name for field in dataclasses.fields(BiomassModel)} - {"parent", "name"}
        return BiomassModel(**{name: getattr(self, name) for name in names}, **options)

    def encode(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """The shared encoder's maps, see `BiomassModel`; with encoders of their own each map is [members, B, h, w, C].

        Raises:
            ArchitectureError: `train`.
        """
        _refuse_training(train)
        if self.shared_encoder:
            return self.encoder(x)
        return [jnp.stack(maps) for maps in zip(*(member.encode(x) for member in self.member), strict=True)]

    def decode(self, maps: list[jax.Array], *, train: bool = False) -> jax.Array:
        """Features of each member: maps of `encode` -> [members, B, h, w, decoder_channels].

        Raises:
            ArchitectureError: `train`.
        """
        _refuse_training(train)
        return jnp.stack(
            [
                member.decode(maps if self.shared_encoder else [one[number] for one in maps])
                for number, member in enumerate(self.member)
            ]
        )

    def estimate(self, features: jax.Array, size: tuple[int, ...], *, train: bool = False) -> jax.Array:
        """The mixture: features of `decode` -> float32 [B, H, W, 2], mean and standard deviation, as labels.

        Raises:
            ArchitectureError: `train`.
        """
        _refuse_training(train)
        found = self._estimates(features, size)
        variances = _VARIANCES[self.spread](found[..., 1]) if self.spread in _VARIANCES else 0.0
        return jnp.stack(mixture(found[..., 0], variances), axis=-1)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Predict biomass: x [B, H, W, bands], z-scored -> float32 [B, H, W, 2], see `estimate`.

        Raises:
            ArchitectureError: `train`.
        """
        _refuse_training(train)
        return self.estimate(self.decode(self.encode(x)), x.shape[1:3])

    def members_of(self, x: jax.Array) -> jax.Array:
        """What each member gives by itself: x as for `__call__` -> float32 [members, B, H, W, C].

        The last axis is that of a member's `outputs`: the mean, and `log_scale` where members have a spread.
        """
        return self._estimates(self.decode(self.encode(x)), x.shape[1:3])

    def _estimates(self, features: jax.Array, size: tuple[int, ...]) -> jax.Array:
        found = [member.estimate(features[number], size) for number, member in enumerate(self.member)]
        return jnp.stack([one if one.ndim == 4 else one[..., None] for one in found])


def _refuse_training(train: bool) -> None:
    if train:
        raise ArchitectureError("an ensemble isn't trained, nor does it draw dropout: train its members and join them")


def join_variables(members: Sequence[dict[str, Any]], *, shared_encoder: bool) -> dict[str, Any]:
    """The variables of an ensemble from those of `BiomassModel`s; with `shared_encoder` the first one's encoder.

    Args:
        members: {"params", "batch_stats"} of each, or their shapes.
        shared_encoder: as the ensemble has it.

    Returns:
        {"params", "batch_stats"} as `BiomassEnsemble` has them.
    """
    params: dict[str, Any] = {"encoder": members[0]["params"]["encoder"]} if shared_encoder else {}
    for number, member in enumerate(members):
        own = {part: tree for part, tree in member["params"].items() if part != "encoder" or not shared_encoder}
        params[f"{MEMBER}{number}"] = own
    stats = {f"{MEMBER}{number}": member["batch_stats"] for number, member in enumerate(members)}
    return {"params": params, "batch_stats": stats}
