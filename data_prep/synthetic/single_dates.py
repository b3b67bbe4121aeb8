"""Single-date scenes without labels, for pretraining: fields, forest, a river, a town, clouds and their shadows.

Fields and clouds are wider than a masked cell, so that what is hidden follows from what is seen around it; the noise of
the sensor does not.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from biomass_jax.data.records import NO_LABEL, SCHEMA_VERSION, Record
from data_prep.synthetic.forest.view import CLOUD, fine_field
from data_prep.synthetic.landscape import PIXEL_M, make_landscape, share_below
from data_prep.synthetic.scene import digital_numbers, off_swath

EPSG, LEFT, TOP = 32610, 600000.0, 4100040.0
PARCEL = 44.0  # px, typical side of a field
MOST_CLOUDS = 0.35  # of a scene
SHADOW = 0.45  # of the light is left in it
_SHADOW_ROWS, _SHADOW_COLS = 14, 9  # pixels from a cloud to its shadow, to the north-west


def cloudy_scene(size: int, seed: int) -> NDArray[np.int16]:
    """Return (size, size, 6) digital numbers of one day over a land of its own; `bands.FILL` off the swath."""
    rng = np.random.default_rng([seed, 3])
    shape = (size, size)
    clear = digital_numbers(make_landscape(shape, seed, parcel=PARCEL), seed=seed)
    share = rng.uniform(0, MOST_CLOUDS)
    rank = share_below(fine_field(shape, rng, roughness=2.2, largest=24).astype(np.float32))
    # Thin only at the rim: the middle of a cloud hides the ground.
    thickness = np.clip(4 * (share - rank) / MOST_CLOUDS, 0, 1)[..., None]
    shaded = np.zeros_like(thickness)
    shaded[:-_SHADOW_ROWS, :-_SHADOW_COLS] = thickness[_SHADOW_ROWS:, _SHADOW_COLS:]
    image = clear * (1 - (1 - SHADOW) * shaded)
    image = image + (np.array(CLOUD) - image) * thickness
    numbers = np.rint(image).astype(np.int16)
    missing = off_swath(shape)
    numbers[missing] = clear[missing]
    return numbers


def unlabelled_chips(scenes: int, *, side: int, per_side: int, seed: int = 0) -> list[Callable[[], Record]]:
    """Return calls that make the chips of scenes of different lands, for `data_prep.shards.write.write_shards`.

    Args:
        scenes: number of scenes; each has `per_side` ** 2 chips.
        side: of a chip in pixels.
        per_side: chips along a side of a scene.
        seed: of the first scene; the next ones count up from it, so that splits of other seeds share no ground.
    """
    made: dict[int, NDArray[np.int16]] = {}

    def chip(scene: int, row: int, col: int) -> Record:
        if scene not in made:
            made.clear()  # chips are asked for scene by scene
            made[scene] = cloudy_scene(side * per_side, scene)
        left, top = LEFT + PIXEL_M * side * col, TOP - PIXEL_M * side * row
        return Record(
            image=made[scene][side * row : side * (row + 1), side * col : side * (col + 1)],
            label=np.full((side, side), NO_LABEL, np.float32),
            agbd_sigma=np.full((side, side), NO_LABEL, np.float32),
            chip_id=f"land{scene}_{row * per_side + col}",
            tile="10SFF",
            row=side * row,
            col=side * col,
            epsg=EPSG,
            transform=np.array([PIXEL_M, 0, left, 0, -PIXEL_M, top]),
            biome="unknown",
            season="",
            sensors="L30",
            schema_version=SCHEMA_VERSION,
        )

    places = [(seed + k, row, col) for k in range(scenes) for row in range(per_side) for col in range(per_side)]
    return [partial(chip, *place) for place in places]
