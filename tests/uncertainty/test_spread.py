import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.errors import PredictionError
from biomass_jax.models.biomass import BiomassModel
from biomass_jax.models.ensemble import BiomassEnsemble, join_variables
from biomass_jax.uncertainty.spread import Spread, channels_of, own_channels, with_spread

pytestmark = pytest.mark.slow  # many, of a second and more each

FIELDS = {
    "embed_dim": 8,
    "depths": (1, 2),
    "num_heads": (1, 2),
    "window_size": 4,
    "patch_size": 2,
    "decoder_channels": 5,
    "pool_scales": (1, 2),
    "upscale_layers": 1,
    "head_dropout": 0.3,
    "drop_path_rate": 0.4,
    "final_relu": False,
    "output_scale": 20.0,
    "output_offset": 50.0,
}


def made(**changed):
    """A model of random weights, all of them, and images (3, 16, 24, 6)."""
    module = BiomassModel(**FIELDS | changed)
    x = jax.random.normal(jax.random.key(1), (3, 16, 24, 6))
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), x[:1]))
    rng = np.random.default_rng(2)
    moved = [0.3 * np.abs(rng.standard_normal(leaf.shape)).astype(np.float32) for leaf in leaves]
    return module, jax.tree.unflatten(tree, moved), x


def run(module, variables, x, **spread):
    return np.asarray(jax.jit(lambda v, x: with_spread(module, Spread(**spread))(v, x)[0])(variables, x))


def test_a_models_own_spread_becomes_a_standard_deviation():
    for spread, factor in (("gaussian", 1.0), ("laplace", 2**0.5)):
        module, variables, x = made(spread=spread)
        raw = np.asarray(jax.jit(module.apply)(variables, x))
        found = run(module, variables, x, way="model")
        np.testing.assert_allclose(found[..., 0], raw[..., 0], rtol=1e-5)
        np.testing.assert_allclose(found[..., 1], factor * np.exp(raw[..., 1]), rtol=1e-5)
        np.testing.assert_array_equal(run(module, variables, x), raw[..., 0])


def test_quantiles_are_the_first_and_the_last():
    module, variables, x = made(spread="quantiles", quantile_levels=(0.1, 0.5, 0.9))
    raw = np.asarray(jax.jit(module.apply)(variables, x))
    assert channels_of(module, Spread("model")) == ("mean", "lo", "hi")
    np.testing.assert_allclose(run(module, variables, x, way="model"), raw[..., [0, 1, 3]], rtol=1e-5)


def test_dropout_scatters_as_its_variance_says():
    module, variables, x = made()
    features = jax.jit(lambda v, x: module.apply(v, module.apply(v, x, method="encode"), method="decode"))(variables, x)
    kernel = np.asarray(variables["params"]["head"]["final"]["kernel"])[0, 0, :, 0]
    # Of a sum of k f m / keep with m one of keep and 0 otherwise, and the head's output scale.
    expected = 20.0 * np.sqrt(np.square(kernel * np.asarray(features)).sum(-1) * 0.3 / 0.7)
    found = run(module, variables, x, way="dropout", samples=4000, seed=5)
    np.testing.assert_allclose(found[..., 1], expected, rtol=0.06)
    np.testing.assert_allclose(found[..., 0], np.asarray(jax.jit(module.apply)(variables, x)), rtol=1e-5)


@pytest.mark.slow
def test_an_ensemble_behind_one_encoder_takes_one_image_at_a_time():
    _, variables, x = made()
    module = BiomassEnsemble(**FIELDS, members=2, shared_encoder=True)
    other = jax.tree.map(lambda leaf: leaf * 1.1, variables)
    joined, x = join_variables([variables, other], shared_encoder=True), jnp.tile(x, (8, 1, 1, 1))

    def sure(x, one_by_one):
        function = with_spread(module, Spread("model"), one_by_one=one_by_one)
        return function(joined, x)[0]

    programs = [jax.jit(partial(sure, one_by_one=way)).lower(x).compile() for way in (False, True)]
    whole, apart = (np.asarray(program(x)) for program in programs)
    np.testing.assert_allclose(apart, whole, rtol=1e-5)
    assert (apart[..., 1] > 0).all()
    loops = [program.as_text().count(" while(") for program in programs]
    assert loops[1] > loops[0]


@pytest.mark.slow
def test_samples_are_the_same_for_every_image_and_every_call():
    module, variables, x = made()
    for way in ("dropout", "drop_path"):
        found = run(module, variables, x, way=way, samples=3)
        np.testing.assert_allclose(run(module, variables, x[1:2], way=way, samples=3)[0], found[1], rtol=1e-4)
        assert np.abs(run(module, variables, x, way=way, samples=3, seed=1) - found)[..., 1].max() > 0.1
        assert (found[..., 1] > 0).all()


@pytest.mark.slow
def test_without_branches_to_lose_drop_path_is_dropout():
    module, variables, x = made(drop_path_rate=0.0)
    lost, dropped = (run(module, variables, x, way=way, samples=4) for way in ("drop_path", "dropout"))
    np.testing.assert_allclose(lost, dropped, rtol=1e-4)
    module, variables, x = made()
    lost, dropped = (run(module, variables, x, way=way, samples=4) for way in ("drop_path", "dropout"))
    assert np.abs(lost - dropped)[..., 1].max() > 0.1


def test_a_spread_of_its_own_adds_to_that_of_samples():
    module, variables, x = made(spread="gaussian")
    plain, plain_variables, _ = made()
    own = run(module, variables, x, way="model")[..., 1]
    for part in ("encoder", "decoder"):
        plain_variables["params"][part] = variables["params"][part]
    plain_variables["params"]["head"] = {k: v for k, v in variables["params"]["head"].items() if k != "spread"}
    plain_variables["batch_stats"] = variables["batch_stats"]
    scatter = run(plain, plain_variables, x, way="dropout", samples=3)[..., 1]
    both = run(module, variables, x, way="dropout", samples=3)[..., 1]
    assert (both > scatter).all()
    # Not the sum of squares to the last digit: each sample has its own spread.
    assert np.median(both / np.hypot(own, scatter)) == pytest.approx(1, abs=0.3)


def lopsided(variables, x):
    """A model that turns and mirrors nothing alike."""
    rows, columns = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
    return x[..., 0] * (1 + 0.1 * rows) + jnp.roll(x[..., 1], 1, axis=2) * columns


def eight(image):
    """The symmetries of a square: (do, undo) for arrays whose first two axes are rows and columns."""
    for turns, mirrored in itertools.product(range(4), (False, True)):
        yield (
            lambda a, t=turns, m=mirrored: np.rot90(a[:, ::-1] if m else a, t),
            lambda a, t=turns, m=mirrored: np.rot90(a, -t)[:, ::-1] if m else np.rot90(a, -t),
        )


@pytest.mark.parametrize("shape", [(7, 7), (5, 8)])
def test_symmetries_are_the_mean_and_the_scatter_of_eight_maps(shape):
    image = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)

    def model(variables, x):
        return jax.jit(lopsided)(variables, x)

    maps = [undo(np.asarray(lopsided(None, jnp.asarray(do(image)[None])))[0]) for do, undo in eight(image)]
    function = with_spread(None, Spread("symmetries"), stub=model)
    found = np.asarray(jax.jit(lambda x: function({}, x)[0])(image[None]))[0]
    np.testing.assert_allclose(found[..., 0], np.mean(maps, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[..., 1], np.std(maps, axis=0, dtype=np.float64), rtol=1e-4, atol=1e-6)


def test_symmetries_of_a_turned_image_are_the_turned_map_to_the_bit():
    image = np.random.default_rng(0).normal(size=(7, 7, 2)).astype(np.float32)
    function = with_spread(None, Spread("symmetries"), stub=lopsided)
    found = np.asarray(function({}, jnp.asarray(image[None]))[0])[0]
    assert found[..., 1].min() > 0
    for do, undo in eight(image):
        turned = np.asarray(function({}, jnp.asarray(do(image)[None]))[0])[0]
        np.testing.assert_array_equal(undo(turned), found)


def test_what_a_model_cannot_say_is_refused():
    plain = BiomassModel(**FIELDS | {"head_dropout": 0.0, "drop_path_rate": 0.0})
    assert own_channels(plain) == ("mean",)
    for way, said in (
        ("model", "gives a mean alone"),
        ("dropout", "head_dropout is 0"),
        ("drop_path", "drops nothing"),
    ):
        with pytest.raises(PredictionError, match=said):
            channels_of(plain, Spread(way))
    quantiles = BiomassModel(**FIELDS, spread="quantiles")
    with pytest.raises(PredictionError, match="quantiles, which have no variance"):
        channels_of(quantiles, Spread("symmetries"))
    with pytest.raises(PredictionError, match="uncertainty is 'luck'"):
        Spread("luck")
    with pytest.raises(PredictionError, match="samples is 1"):
        Spread("dropout", samples=1)
