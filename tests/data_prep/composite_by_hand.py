"""What tests of composites share: granules with random numbers, and composites pixel by pixel in exact arithmetic."""

from dataclasses import replace
from datetime import datetime, timedelta
from fractions import Fraction
from functools import partial
from math import floor

import numpy as np
import rasterio

from data_prep.hls import composite as module
from data_prep.hls.granules import find_scenes
from data_prep.season import Season
from data_prep.synthetic.granule import Overpass, write_granule

SEASON = Season.parse("2020-06-01/2020-09-16")
SHAPE = (23, 31)
CODES = np.array([0, 1, 0b00100000, 0b11000000, 0b11100001, 0b00000010, 0b100, 0b1000, 0b10000, 0b01000110, 255])
FIRST = Overpass(time=datetime(2020, 6, 1, 18, 45, 12))


def made(rng, shape=SHAPE):
    """Random digital numbers and Fmask codes, with fill, negative and very bright values."""
    image = rng.integers(-300, 300, (*shape, 6)) * rng.integers(1, 60, (*shape, 6))
    image[rng.random((*shape, 6)) < 0.03] = -9999
    return image.astype(np.int16), rng.choice(CODES, shape).astype(np.uint8)


def clear_by_hand(values, code, water, aerosol):
    if code == 255 or any(value == -9999 for value in values):
        return False
    if (code >> 1) & 1 or (code >> 2) & 1 or (code >> 3) & 1 or (code >> 4) & 1:
        return False
    return not (water and (code >> 5) & 1) and not (aerosol and code >> 6 == 3)


def half_even(value):
    whole = floor(value)
    rest = value - whole
    return whole + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1))


def middle(values):
    ordered = sorted(values)
    return Fraction(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2], 2)


composite = partial(module.composite, min_clear=1)  # of the few scenes of these worlds


def by_hand(scenes, *, statistic="mean", min_clear=1, water=False, aerosol=False):
    """(7, rows, columns), pixel by pixel in exact arithmetic."""
    out = np.full((7, *SHAPE), -9999)
    out[6] = 0
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            good = []
            for image, fmask in scenes:
                values = image[row, column].tolist()
                if clear_by_hand(values, int(fmask[row, column]), water, aerosol):
                    good.append(values)
            if len(good) < min_clear:
                continue
            for band in range(6):
                series = [values[band] for values in good]
                exact = Fraction(sum(series), len(series)) if statistic == "mean" else middle(series)
                out[band, row, column] = half_even(exact)
            out[6, row, column] = len(good)
    return out


def chosen(arrays, sensors):
    return [arrays[name] for name in arrays if name.split(".")[1] in sensors]


def read(path):
    with rasterio.open(path) as dataset:
        return dataset.read()


def pair(tmp_path, *values):
    """One-pixel-high scenes on days of June, each of one value in all bands."""
    for day, value in enumerate(values):
        image = np.full((3, 4, 6), value, np.int16)
        write_granule(
            tmp_path, image, np.zeros((3, 4), np.uint8), replace(FIRST, time=FIRST.time + timedelta(days=day))
        )
    return find_scenes(tmp_path)
