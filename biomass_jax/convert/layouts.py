"""The known layouts of PyTorch checkpoints, each one table: torch module, path in our variables, kind of module.

Sources: the released granite checkpoint (terratorch 0.99.2 key names), microsoft/SimMIM, microsoft/Swin-Transformer,
timm 1.0 (its `features_only` models write `layers_0` for `layers.0`).
"""

import re
from collections.abc import Iterable

from biomass_jax.convert.rows import (
    BATCH_NORM,
    CLASSIFIER,
    CONV,
    CONV_ALONE,
    LINEAR,
    LINEAR_ALONE,
    MASK_TOKEN,
    MASK_TOKEN_LEFT,
    NORM,
    POSITION_BIAS,
    SHIFT_MASK,
    UNFOLD_LINEAR,
    UNFOLD_NORM,
    Layout,
    Modules,
    name_list,
)
from biomass_jax.errors import ConvertError


def _block(torch: str, ours: str, *, attention: str, fc1: str, fc2: str) -> Modules:
    return (
        (f"{torch}.norm1", f"{ours}/norm1", NORM),
        (f"{torch}.{attention}", f"{ours}/attn", POSITION_BIAS),
        (f"{torch}.{attention}.qkv", f"{ours}/attn/qkv", LINEAR),
        (f"{torch}.{attention}.proj", f"{ours}/attn/proj", LINEAR),
        (f"{torch}.norm2", f"{ours}/norm2", NORM),
        (f"{torch}.{fc1}", f"{ours}/mlp/fc1", LINEAR),
        (f"{torch}.{fc2}", f"{ours}/mlp/fc2", LINEAR),
    )


def _original(prefix: str) -> Modules:
    """The original Swin, which SimMIM shares."""
    stage, block = f"{prefix}layers.{{i}}", f"{prefix}layers.{{i}}.blocks.{{j}}"
    return (
        (f"{prefix}patch_embed.proj", "encoder/patch_embed/projection", CONV),
        (f"{prefix}patch_embed.norm", "encoder/patch_embed/norm", NORM),
        (block, "", SHIFT_MASK),  # a block's own buffer comes before those of its parts
        *_block(block, "encoder/stages_{i}/blocks_{j}", attention="attn", fc1="mlp.fc1", fc2="mlp.fc2"),
        (f"{stage}.downsample.reduction", "encoder/stages_{i}/downsample/reduction", LINEAR_ALONE),
        (f"{stage}.downsample.norm", "encoder/stages_{i}/downsample/norm", NORM),
        (f"{prefix}norm", "encoder/norm", NORM),
    )


def _conv_norm(torch: str, ours: str) -> Modules:
    return ((f"{torch}.conv", f"{ours}/conv", CONV_ALONE), (f"{torch}.norm", f"{ours}/norm", BATCH_NORM))


GRANITE = Layout(
    name="granite",
    task="biomass",
    modules=(
        ("encoder.patch_embed.projection", "encoder/patch_embed/projection", CONV),
        ("encoder.patch_embed.norm", "encoder/patch_embed/norm", NORM),
        *_block(
            "encoder.stages_{i}.blocks.{j}",
            "encoder/stages_{i}/blocks_{j}",
            attention="attn.w_msa",
            fc1="ffn.layers.0.0",
            fc2="ffn.layers.1",
        ),
        ("encoder.stages_{i}.downsample.norm", "encoder/stages_{i}/downsample/norm", UNFOLD_NORM),
        ("encoder.stages_{i}.downsample.reduction", "encoder/stages_{i}/downsample/reduction", UNFOLD_LINEAR),
        ("encoder.stages_{i}.norm", "encoder/stages_{i}/norm", NORM),
        *_conv_norm("decoder.psp_modules.{k}.1", "decoder/psp_modules_{k}"),
        *_conv_norm("decoder.bottleneck", "decoder/bottleneck"),
        *_conv_norm("decoder.lateral_convs.{l}", "decoder/lateral_convs_{l}"),
        *_conv_norm("decoder.fpn_convs.{f}", "decoder/fpn_convs_{f}"),
        *_conv_norm("decoder.fpn_bottleneck", "decoder/fpn_bottleneck"),
        ("head.head.0.{u}.conv", "head/upscale_{u}/conv", CONV),
        ("head.head.0.{u}.bn", "head/upscale_{u}/norm", BATCH_NORM),
        ("head.head.2", "head/final", CONV),
    ),
    spellings=((r"^model\.", ""), (r"^encoder\.stages\.", "encoder.stages_")),
    shift_single_window=True,
)

SIMMIM = Layout(
    name="simmim",
    task="simmim",
    modules=(("encoder", "", MASK_TOKEN), *_original("encoder."), ("decoder.0", "decoder", CONV)),
)

# A SimMIM file whose decoder was stripped: an encoder to fine-tune, which has no use for the mask token.
SIMMIM_ENCODER = Layout(
    name="simmim-encoder", task="encoder", modules=(("encoder", "", MASK_TOKEN_LEFT), *_original("encoder."))
)

MICROSOFT = Layout(name="microsoft", task="encoder", modules=(*_original(""), ("head", "", CLASSIFIER)))

# timm puts a stage's downsample before its blocks, so that `layers.1.downsample` is the one that ends our stage 0. (Its
# rows keep the original's order: nothing is written in timm's layout.)
TIMM = Layout(
    name="timm",
    task="encoder",
    modules=(
        *((key, path.replace("{i}/downsample", "{i-1}/downsample"), kind) for key, path, kind in _original("")),
        ("head.fc", "", CLASSIFIER),
        ("head", "", CLASSIFIER),  # before timm 0.9
    ),
    spellings=((r"^module\.", ""), (r"^layers_", "layers.")),
)


def detect(keys: Iterable[str]) -> Layout:
    """The layout of a checkpoint, from its keys.

    Raises:
        ConvertError: no layout, or two at once.
    """
    names = [re.sub(r"^module\.", "", key) for key in keys]
    simmim = SIMMIM if any(name.startswith("decoder.") for name in names) else SIMMIM_ENCODER
    found = [
        layout
        for layout, pattern in ((GRANITE, r"(model\.)?encoder\.stages[._]\d"), (simmim, r"encoder\.layers\.\d"))
        if any(re.match(pattern, name) for name in names)
    ]
    plain = [(int(m[2]), m[1], name) for name in names if (m := re.match(r"layers([._])(\d+)\.", name))]
    if plain:
        # Both have layers.N; the downsample between two stages is in the first of them here and in the second there.
        halved = {number for number, _, name in plain if ".downsample." in name}
        if any(separator == "_" for _, separator, _ in plain) or max(number for number, *_ in plain) in halved:
            found.append(TIMM)
        if 0 in halved:
            found.append(MICROSOFT)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConvertError(f"the keys belong to several layouts at once: {', '.join(x.name for x in found)}")
    raise ConvertError(
        f"no known layout. Known: granite (encoder.stages_0...), simmim (encoder.layers.0...), microsoft and timm Swin "
        f"(layers.0...). Found keys: {name_list(names, 5)}"
    )
