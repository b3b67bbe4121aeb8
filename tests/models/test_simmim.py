"""SimMIM beside its parity with the original: what is masked cannot be seen, what isn't masked can."""

import jax
import numpy as np
import pytest

from biomass_jax.models.build import abstract_variables
from biomass_jax.models.simmim import SimMIM
from biomass_jax.tasks.simmim import block_mask

SIDE = (64, 96)  # px; the last map has 2 x 3 tokens


@pytest.fixture(scope="module")
def model():
    """(function of image and mask, image, mask): random weights, cells of 16 px."""
    module = SimMIM(embed_dim=4, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=3, mlp_ratio=2)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *SIDE, 6)).astype(np.float32)
    mask = np.asarray(block_mask(jax.random.key(1), 2, *SIDE, mask_patch_size=16))
    # Drawn by NumPy: an initialisation takes longer to compile than the model.
    variables = jax.tree.map(
        lambda a: rng.normal(scale=0.5, size=a.shape).astype(np.float32), abstract_variables(module)
    )
    apply = jax.jit(lambda x, m: module.apply(variables, x, m), compiler_options={"xla_backend_optimization_level": 0})
    return apply, image, mask


def test_the_output_is_an_image_in_float32(model):
    apply, image, mask = model
    assert apply(image, mask).shape == image.shape
    assert apply(image, mask).dtype == np.float32


def test_masked_pixels_have_no_influence_and_all_others_have(model):
    apply, image, mask = model
    pixels = mask.repeat(4, axis=1).repeat(4, axis=2)[..., None] == 1
    expected = apply(image, mask)
    other = np.random.default_rng(3).normal(size=image.shape).astype(np.float32)
    assert (apply(np.where(pixels, other, image), mask) == expected).all()
    seen = np.argwhere(mask == 0)
    for n, row, column in (seen[0], seen[len(seen) // 2], seen[-1]):
        changed = image.copy()
        changed[n, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        found = apply(changed, mask)
        assert not np.array_equal(found[n], expected[n])
        assert (found[1 - n] == expected[1 - n]).all()


def test_the_mask_itself_changes_the_output(model):
    apply, image, mask = model
    assert not np.array_equal(apply(image, mask[:, ::-1]), apply(image, mask))


def test_a_mask_that_would_broadcast_is_an_error(model):
    apply, image, mask = model
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 1\).*tokens \(2, 16, 24\)"):
        apply(image, mask[:, :1, :1])
