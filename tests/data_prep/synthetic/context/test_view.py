"""What the context world's pictures tell: cover up to a bound, stature by texture, nothing else."""

import numpy as np
import pytest

from data_prep.synthetic.context.land import BRIGHT, Context
from data_prep.synthetic.context.view import SHADOW, TEXTURE, lit, surface

LEFT, TOP = 600000.0, 4100040.0
SHAPE = (200, 220)


def views(**changes):
    context = Context(1)
    at = context.pixels(LEFT, TOP, SHAPE)
    at = at._replace(**{name: np.full(SHAPE, value) for name, value in changes.items()})
    crowns = context.crowns(LEFT, TOP, (SHAPE[0] + 1, SHAPE[1]))
    return at, crowns, surface(at, crowns, 0.9)


def test_a_colour_tells_the_cover_until_it_saturates():
    none = {"bare": False, "water": False, "moist": True, "stature": 0.0}
    red = [surface(views(**none, cover=cover)[0], np.zeros((201, 220)), 0.9)[0, 0, 2] for cover in (20, 90, 149)]
    assert red[0] > red[1] + 200 > red[2] + 200
    for cover in (BRIGHT, 200, 400):
        found = surface(views(**none, cover=cover)[0], np.zeros((201, 220)), 0.9)
        np.testing.assert_array_equal(found, surface(views(**none, cover=BRIGHT)[0], np.zeros((201, 220)), 0.9))


@pytest.mark.parametrize("name", ["lee", "river"])
def test_it_does_not_tell_the_wind_nor_the_river(name):
    at, _, image = views()
    _, _, other = views(**{name: 0.3})
    np.testing.assert_array_equal(image, other)
    assert getattr(at, name).std() > 0.1


def test_texture_grows_with_stature_and_the_south_shades():
    for stature, share in ((-1.0, 0.1), (1.0, 1.0)):
        at, crowns, _ = views(stature=stature)
        light = lit(at, crowns)
        assert light.std() == pytest.approx(TEXTURE * share * np.sqrt(1 + SHADOW**2), rel=0.02)
        assert light.mean() == pytest.approx(1, abs=0.005)
        # A bright crown takes from its northern neighbour, not from the eastern one.
        north, east = (
            np.corrcoef((light[:-1] - 1).ravel(), (light[1:] - 1).ravel())[0, 1],
            np.corrcoef((light[:, :-1] - 1).ravel(), (light[:, 1:] - 1).ravel())[0, 1],
        )
        assert north == pytest.approx(-SHADOW / (1 + SHADOW**2), abs=0.02)
        assert east == pytest.approx(0, abs=0.02)
