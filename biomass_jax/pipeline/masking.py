"""Which parts of a chip a masked image model doesn't see: square cells, drawn on the device from the step's key.

Xie et al., arXiv 2111.09886, section 3.2; microsoft/SimMIM data/data_simmim.py (`MaskGenerator`).
"""

import math

import jax
import jax.numpy as jnp


def block_mask(
    key: jax.Array,
    batch: int,
    height: int,
    width: int,
    *,
    mask_patch_size: int = 32,
    patch_size: int = 4,
    ratio: float = 0.6,
) -> jax.Array:
    """Mask ceil(ratio * cells) of each chip's cells, every set of that many equally likely.

    A chip's draw depends on the key and its row in the batch alone: it is the same for any batch size and on any
    number of devices.

    Args:
        key: the step's key.
        batch: number of chips, B.
        height: of the chips in pixels, a multiple of `mask_patch_size`.
        width: likewise.
        mask_patch_size: side of a cell in pixels, a multiple of `patch_size`.
        patch_size: side in pixels of the model's tokens, p.
        ratio: share of the cells to mask, 0..1.

    Returns:
        float32 [B, H/p, W/p], 1 where a token is masked.

    Raises:
        ValueError: sizes that don't divide each other, or a ratio outside 0..1.
    """
    if mask_patch_size < 1 or patch_size < 1 or mask_patch_size % patch_size:
        raise ValueError(f"mask patch {mask_patch_size} px: expected a multiple of the model's patch, {patch_size} px")
    if height < 1 or width < 1 or height % mask_patch_size or width % mask_patch_size:
        raise ValueError(
            f"chips of {height} x {width} px cannot be masked in cells of {mask_patch_size} px: expected both sides to "
            "be multiples of it; choose another mask patch or crop size"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask ratio {ratio}: expected a share of the cells, 0..1")
    rows, columns = height // mask_patch_size, width // mask_patch_size
    cells, repeat = rows * columns, mask_patch_size // patch_size
    masked = math.ceil(ratio * cells)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))
    # A cell is masked if its place in a random order of all cells is among the first ones: their number is exact.
    places = jax.vmap(lambda k: jax.random.permutation(k, cells))(keys)
    mask = (places < masked).astype(jnp.float32).reshape(batch, rows, columns)
    return mask.repeat(repeat, axis=1).repeat(repeat, axis=2)
