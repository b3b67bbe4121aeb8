"""What a label is: names, units, limits; what metadata say wins over the table, and what can't be is refused."""

import math

import pytest

from biomass_jax.data import labels
from biomass_jax.errors import DataError


def test_biomass_is_what_nothing_says():
    assert labels.described({}) == labels.described({"name": "agbd", "units": "Mg ha-1", "none": -1}) == labels.BIOMASS
    assert labels.BIOMASS.metadata() == {"name": "agbd", "units": "Mg ha-1"}  # as shards always had it
    assert labels.of_output({"bands": ["agbd", "agbd_sd"], "units": "Mg ha-1", "nodata": -1}) == labels.BIOMASS


@pytest.mark.parametrize("name", ["canopy_height", "rh0", "rh98", "rh100"])
def test_heights_are_in_metres_and_come_back_from_metadata(name):
    height = labels.parse(name)
    assert (height.name, height.units, height.unit, height.adds_up) == (name, "m", "m", False)
    assert height.bins == ((0, 10), (10, 20), (20, 30), (0, 30), (30, math.inf))
    assert labels.described(height.metadata()) == height
    assert labels.percentile(name) == (None if name == "canopy_height" else int(name[2:]))


@pytest.mark.parametrize("name", ["rh101", "rh", "rh-1", "rh07", "rh98_sd", "AGBD", ""])
def test_other_names_are_refused(name):
    with pytest.raises(DataError, match="config.data.label is .*; expected agbd, canopy_height, or a relative height"):
        labels.parse(name, "config.data.label")


def test_metadata_win_over_the_table():
    found = labels.described({"name": "rh95", "units": "metres", "top": 60, "bins": [[0, 5], [5, None]]})
    assert (found.top, found.bins, found.units) == (60.0, ((0, 5), (5, math.inf)), "m")
    with pytest.raises(DataError, match="shards: the label rh98 is in 'Mg ha-1'; expected m"):
        labels.described({"name": "rh98", "units": "Mg ha-1"}, "shards")
    with pytest.raises(DataError, match="the label agbd is in 'm'; expected Mg ha-1"):
        labels.described({"name": "agbd", "units": "m"})


def test_an_unknown_label_has_its_own_name_and_unit_and_no_limits():
    found = labels.described({"name": "cover", "units": "1"})
    assert (found.name, found.unit, found.title, found.top, found.bins) == (
        "cover",
        "1",
        "cover",
        math.inf,
        ((0, math.inf),),
    )
    assert labels.described(found.metadata()) == found


def test_titles_of_bands():
    assert labels.title_of("agbd") == "Above-ground biomass"
    assert labels.title_of("agbd_sd") == "Standard deviation of the above-ground biomass"
    assert labels.title_of("canopy_height_lo") == "Canopy height, lower end of the interval"
    assert labels.title_of("rh98") == "Relative height, 98 % of the energy below"
    assert labels.title_of("di") == "di"
