"""SimMIM's loss against plain loops; its golden values are in tests/parity/test_simmim.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax.tasks.losses import patch_statistics, simmim_chip_sums, simmim_finish

PATCH = 2


@pytest.fixture
def case():
    """Two images of 8 x 12 px and 3 bands, tokens of 2 px, 11 pixels without data, some of them masked."""
    rng = np.random.default_rng(5)
    image = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    reconstruction = rng.normal(size=image.shape).astype(np.float32)
    mask = (rng.random((2, 4, 6)) < 0.6).astype(np.float32)
    nodata = np.zeros((2, 8, 12), bool)
    nodata.flat[rng.choice(nodata.size, 11, replace=False)] = True
    return image, reconstruction, mask, nodata


def loss_sums(*arrays, **options):
    """(total, count) over all chips and bands, as the task adds them up."""
    return [sums.sum() for sums in simmim_chip_sums(*arrays, patch_size=PATCH, **options)]


def by_loops(target, reconstruction, mask, nodata=None):
    """(total, count), float64 [B, bands]."""
    b, h, w, bands = target.shape
    total, count = np.zeros((b, bands)), np.zeros((b, bands))
    for n, y, x, c in np.ndindex(b, h, w, bands):
        if mask[n, y // PATCH, x // PATCH] == 1 and (nodata is None or not nodata[n, y, x]):
            total[n, c] += abs(float(target[n, y, x, c]) - float(reconstruction[n, y, x, c]))
            count[n, c] += 1
    return total, count


@pytest.mark.parametrize("leave_out", [False, True])
def test_sums_are_those_of_plain_loops(case, leave_out):
    image, reconstruction, mask, nodata = case
    nodata = nodata if leave_out else None
    total, count = by_loops(image, reconstruction, mask, nodata)
    found = simmim_chip_sums(image, reconstruction, mask, patch_size=PATCH, nodata=nodata)
    np.testing.assert_allclose(found, (total, count), rtol=1e-6)
    sums = loss_sums(image, reconstruction, mask, nodata=nodata)
    np.testing.assert_allclose(sums, (total.sum(), count.sum()), rtol=1e-6)


def test_the_loss_of_the_sums_is_the_originals(case):
    image, reconstruction, mask, _ = case
    pixels = np.kron(mask, np.ones((PATCH, PATCH)))[..., None].astype(np.float64)
    official = (np.abs(image - reconstruction) * pixels).sum() / (pixels.sum() + 1e-5) / 3
    loss = simmim_finish(*loss_sums(image, reconstruction, mask), bands=3)
    np.testing.assert_allclose(loss, official, rtol=1e-6)
    chips = simmim_chip_sums(image, reconstruction, mask, patch_size=PATCH)
    bands = simmim_finish(*(sums.sum(0) for sums in chips), bands=1)
    np.testing.assert_allclose(
        bands, (np.abs(image - reconstruction) * pixels).sum((0, 1, 2)) / pixels.sum(), rtol=1e-6
    )
    np.testing.assert_allclose(bands.mean(), official, rtol=1e-6)


def test_sums_of_parts_give_the_loss_of_the_whole(case):
    image, reconstruction, mask, nodata = case
    parts = [
        loss_sums(image[i : i + 1], reconstruction[i : i + 1], mask[i : i + 1], nodata=nodata[i : i + 1])
        for i in range(2)
    ]
    assert parts[0][1] != parts[1][1]  # else the mean of the parts' losses would do
    whole = loss_sums(image, reconstruction, mask, nodata=nodata)
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


def gradient(image, reconstruction, mask, **options):
    def loss(rec):
        return simmim_finish(*loss_sums(image, rec, mask, **options), bands=3)

    return jax.value_and_grad(loss)(jnp.asarray(reconstruction))


def test_the_gradient_is_the_sign_over_the_number_of_values(case):
    image, reconstruction, mask, nodata = case
    _, count = by_loops(image, reconstruction, mask, nodata)
    pixels = np.kron(mask, np.ones((PATCH, PATCH)))[..., None] * ~nodata[..., None]
    expected = np.sign(reconstruction - image) * pixels / count.sum()
    np.testing.assert_allclose(gradient(image, reconstruction, mask, nodata=nodata)[1], expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"normalize_patch": 4}])
def test_values_without_data_have_no_influence(case, options):
    image, reconstruction, mask, nodata = case
    expected = gradient(image, reconstruction, mask, nodata=nodata, **options)
    for junk in (np.nan, np.inf, 1e30):
        spoilt = np.where(nodata[..., None], np.float32(junk), image)
        loss, found = gradient(spoilt, reconstruction, mask, nodata=nodata, **options)
        assert loss == expected[0]
        assert (found == expected[1]).all()


@pytest.mark.parametrize("why", ["nothing masked", "no data anywhere"])
@pytest.mark.parametrize("options", [{}, {"normalize_patch": 4}])
def test_a_batch_without_a_masked_pixel_has_loss_0_and_no_gradient(case, why, options):
    image, reconstruction, mask, nodata = case
    mask = mask if why == "no data anywhere" else np.zeros_like(mask)
    nodata = np.ones_like(nodata) if why == "no data anywhere" else nodata
    loss, found = gradient(image, reconstruction, mask, nodata=nodata, **options)
    assert loss == 0
    assert (found == 0).all()


def test_patch_statistics_are_those_of_plain_loops(case):
    image, _, _, nodata = case
    nodata[1, 4:8, 8:12] = True  # a patch without data
    nodata[1, 0:4, 0:4] = True
    nodata[1, 2, 3] = False  # one with a single pixel
    mean, std = patch_statistics(image, 4, nodata)
    for n, y, x, c in np.ndindex(2, 2, 3, 3):
        at = np.s_[n, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        values = image[at][..., c][~nodata[at]].astype(np.float64)
        expected_mean = values.mean() if values.size else 0
        variance = values.var(ddof=1) if values.size > 1 else 0
        np.testing.assert_allclose(mean[at][..., c], expected_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(std[at][..., c], np.sqrt(variance + 1e-6), rtol=1e-5)


def test_normalised_targets_forgive_a_patchs_brightness_and_contrast(case):
    image, reconstruction, mask, nodata = case
    mean, std = patch_statistics(image, 4, nodata)
    options = {"nodata": nodata, "normalize_patch": 4}
    total, _ = loss_sums(image, reconstruction, mask, **options)
    target = (image - np.asarray(mean)) / np.asarray(std)
    np.testing.assert_allclose(total, by_loops(target, reconstruction, mask, nodata)[0].sum(), rtol=1e-5)
    gain = np.kron(np.arange(1.0, 13).reshape(2, 2, 3), np.ones((4, 4)))[..., None].astype(np.float32)
    np.testing.assert_allclose(
        loss_sums(image * gain + 10 * gain, reconstruction, mask, **options)[0], total, rtol=1e-3
    )
    assert loss_sums(image, (image - mean) / std, mask, **options)[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, r, m, n: (i, r[..., :1], m, n), "reconstruction"),
        (lambda i, r, m, n: (i, r, m[:1], n), r"mask \(1, 4, 6\)"),
        (lambda i, r, m, n: (i, r, m[:, :2], n), "does not cover"),
        (lambda i, r, m, n: (i, r, m, n[:1]), "nodata"),
    ],
)
def test_shapes_that_would_broadcast_are_errors(case, change, message):
    image, reconstruction, mask, nodata = change(*case)
    with pytest.raises(ValueError, match=message):
        loss_sums(image, reconstruction, mask, nodata=nodata)


def test_patches_that_do_not_divide_the_image_are_errors(case):
    with pytest.raises(ValueError, match="8 x 12 px.*patches of 5 px"):
        patch_statistics(case[0], 5)
