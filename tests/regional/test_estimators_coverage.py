"""Intervals hold what they say in simulated populations, 500 draws or more, and not where what they assume isn't so."""

import pytest

from biomass_jax.regional.estimators import Correlation
from tests.regional import populations

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def check(held):
    """Each zone's share is between 93 and 97 %; chance alone makes it differ by 1 % from 95 with 500 draws."""
    assert all(0.93 <= round(share, 4) <= 0.97 for share in held.values()), held


def test_the_maps_intervals_hold_with_a_correlation_that_is_known():
    check(populations.map_draws(500))


def test_the_maps_intervals_do_not_hold_as_if_pixels_were_independent():
    held = populations.map_draws(100, Correlation(1.0, 1.0, 0.0))
    assert held[5] < 0.6 and held[500] < 0.3


def test_the_maps_intervals_hold_with_a_correlation_that_is_fitted():
    check(populations.two_fitted_draws(500))


def test_model_assisted_intervals_hold_by_tracks_and_not_by_shots():
    check(populations.assisted_draws(500, populations.TRACKS))
    held = populations.assisted_draws(100, populations.TRACKS, by_shot=True)
    assert held[5] < 0.9


def test_intervals_of_change_hold_with_what_the_raster_tells_of_its_errors():
    held = populations.change_draws(60)
    assert all(0.93 <= share <= 0.97 for share in held.values()), held


def test_hybrid_intervals_hold_with_the_models_part_and_not_without():
    check(populations.hybrid_draws(500, populations.TRACKS))
    held = populations.hybrid_draws(100, populations.TRACKS, with_model=False)
    assert held[500] < 0.8
