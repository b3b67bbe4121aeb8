"""The reference's tensors as our variables, written out by hand: it owes nothing to the converter it helps to test."""

import re

import numpy as np

RENAMES = (
    (r"^encoder\.patch_embed\.proj\.", "encoder.patch_embed.projection."),
    (r"\.blocks\.(\d+)\.", r".blocks_\1."),
    (r"^encoder\.layers\.(\d+)\.", r"encoder.stages_\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.psp_modules\.(\d)\.1\.", r".psp_modules_\1."),
    (r"\.(lateral_convs|fpn_convs)\.(\d)\.", r".\1_\2."),
    (r"^head\.head\.0\.(\d)\.conv\.", r"head.upscale_\1.conv."),
    (r"^head\.head\.0\.(\d)\.bn\.", r"head.upscale_\1.norm."),
    (r"^head\.head\.2\.", "head.final."),
    (r"^encoder\.mask_token$", "mask_token"),
    (r"^decoder\.0\.", "decoder."),
)
BUFFERS = ("relative_position_index", "attn_mask", "num_batches_tracked")


def unfold_to_blocks(channels):
    """Granite's index of each of our merged channels: ours are blocks of C, theirs c * 4 + row * 2 + column."""
    return np.asarray([c * 4 + row * 2 + col for col in (0, 1) for row in (0, 1) for c in range(channels)])


def to_variables(tensors, *, unfold_order):
    """{torch name: array} -> {"params", "batch_stats"}; `unfold_order` for granite's PatchMerging."""
    variables = {"params": {}, "batch_stats": {}}
    for name, array in tensors.items():
        if name.endswith(BUFFERS):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        *folders, leaf = name.split(".")
        if unfold_order and "downsample" in folders:
            array = array[..., unfold_to_blocks(array.shape[-1] // 4)]
        collection = "batch_stats" if leaf.startswith("running_") else "params"
        if leaf == "weight":
            leaf = {1: "scale", 2: "kernel", 4: "kernel"}[array.ndim]
            array = {1: array, 2: array.T, 4: array.transpose(2, 3, 1, 0) if array.ndim == 4 else None}[array.ndim]
        leaf = {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        branch = variables[collection]
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = np.ascontiguousarray(array)
    return variables


def relative_error(ours, reference):
    """max|ours - reference| / max|reference|, the measure of every parity test."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"shape {ours.shape}, the reference has {reference.shape}"
    return np.abs(ours - reference).max() / np.abs(reference).max()
