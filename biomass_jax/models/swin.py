"""Swin Transformer encoder, NHWC, for inputs of any size.

Liu et al., arXiv 2103.14030, with the details in which the granite encoder differs set by fields: it shifts windows
also where the map is a single window, normalises each stage's output for a decoder, and replicates the edge where the
image is no multiple of the patch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from biomass_jax.models import initialisation, shapes, swin_ops
from biomass_jax.models.fused import attention, choice, mlp
from biomass_jax.models.layers import Dense, LayerNorm, gelu
from biomass_jax.models.lora import Lora, dense, lean
from biomass_jax.models.shapes import Size
from biomass_jax.runtime import cpu, mesh

Dtype = Any

# Depths, heads and widths of the published variants; everything else is shared.
VARIANTS: dict[str, dict[str, Any]] = {
    "swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "swin_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "swin_l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


class PatchEmbed(nn.Module):
    """Non-overlapping convolution and LayerNorm; the image is edge-replicated to a multiple of the patch."""

    embed_dim: int
    patch_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, bands] -> [B, ceil(H/p), ceil(W/p), E]."""
        p = self.patch_size
        pad_h, pad_w = -x.shape[1] % p, -x.shape[2] % p
        if pad_h or pad_w:
            x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)), mode="edge")
        project = nn.Conv(
            self.embed_dim,
            (p, p),
            strides=(p, p),
            padding="VALID",
            dtype=self.dtype,
            conv_general_dilated=swin_ops.patch_product,
            name="projection",
            **initialisation.conv(x.shape[-1] * p * p),
        )
        x = project(x)
        return LayerNorm(self.dtype, name="norm")(x)


class Mlp(nn.Module):
    """Two dense layers with the exact (erf) GELU between them."""

    hidden_dim: int
    initializer: str = "torch"
    dtype: Dtype = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> [..., C]."""
        c, kind = x.shape[-1], self.initializer
        same: dict[str, Any] = {"dtype": self.dtype, "lora": self.lora}
        x = dense(self.hidden_dim, name="fc1", **same, **initialisation.dense(kind, c))(x)
        x = gelu(x)
        return dense(c, name="fc2", **same, **initialisation.dense(kind, self.hidden_dim))(x)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows of a map, with a relative position bias."""

    num_heads: int
    window_size: int
    initializer: str = "torch"
    attention: str = "auto"
    dtype: Any = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shift: Size) -> jax.Array:
        """x [B, H, W, C], H and W multiples of the window -> same shape. Softmax in float32.

        Windows are those of the map rolled by `shift` tokens, in which what lay apart before doesn't attend.
        """
        _, height, width, c = x.shape
        size = self.window_size
        fused = choice.attention_is_fused(self.attention, x.shape, self.num_heads, size, self.dtype)
        table = self.param(
            "relative_position_bias_table",
            initialisation.bias_table(self.initializer),
            ((2 * size - 1) ** 2, self.num_heads),
            jnp.float32,
        )
        how: dict[str, Any] = {"dtype": self.dtype, "lora": self.lora, **initialisation.dense(self.initializer, c)}
        qkv = dense(3 * c, name="qkv", **how)
        proj = dense(c, name="proj", **how)
        bias = table[swin_ops.relative_position_index(size)].transpose(2, 0, 1)
        if fused and not self.is_initializing():
            attend = functools.partial(attention.attend, window_size=size, shift=shift)
            return proj(mesh.on_each_device(attend, qkv(x), bias))
        mask = None if shapes.is_zero(shift) else swin_ops.shift_mask(height, width, size, shift)
        windows = swin_ops.attend_windows(qkv(swin_ops.to_windows(x, size, shift)), bias, mask)
        return swin_ops.from_windows(proj(windows), size, shift, height, width)


class SwinBlock(nn.Module):
    """Windowed attention and an MLP, each behind a LayerNorm and added to its input."""

    num_heads: int
    window_size: int
    mlp_ratio: float
    drop_path_rate: float
    shifted: bool
    shift_single_window: bool
    initializer: str = "torch"
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, C]."""
        c = x.shape[-1]
        x = cpu.computed_once(x)
        # Both branches share the rate but draw independently, as in the reference.
        y = self._attend(LayerNorm(self.dtype, name="norm1")(x))
        x = x + swin_ops.DropPath(self.drop_path_rate)(y, train=train)
        x = cpu.computed_once(x)
        if weights := self._weights_of_kernel(x, train):
            return mesh.on_each_device(mlp.add_mlp, x, weights)
        y = Mlp(int(c * self.mlp_ratio), self.initializer, self.dtype, self.lora, name="mlp")(
            LayerNorm(self.dtype, name="norm2")(x)
        )
        return x + swin_ops.DropPath(self.drop_path_rate)(y, train=train)

    def _weights_of_kernel(self, x: jax.Array, train: bool) -> mlp.MlpWeights | None:
        """The weights of norm2 and mlp where a kernel computes both, None where their modules do."""
        hidden = int(x.shape[-1] * self.mlp_ratio)
        if train or self.is_initializing() or not choice.mlp_is_fused(self.attention, x.shape, hidden, self.dtype):
            return None
        norm: dict[str, jax.Array] = self.get_variable("params", "norm2")
        dense: dict[str, dict[str, jax.Array]] = self.get_variable("params", "mlp")
        if any(set(dense[name]) != {"kernel", "bias"} for name in ("fc1", "fc2")):
            return None  # the modules hold more than the kernel knows of
        fc1, fc2 = dense["fc1"], dense["fc2"]
        return mlp.MlpWeights(norm["scale"], norm["bias"], fc1["kernel"], fc1["bias"], fc2["kernel"], fc2["bias"])

    def _attend(self, x: jax.Array) -> jax.Array:
        _, h, w, _ = x.shape
        size = self.window_size
        # Zeros come after the norm and are not masked: in the reference a window sees its padding.
        padded_h, padded_w = shapes.rounded_up(h, size), shapes.rounded_up(w, size)
        pad_h, pad_w = padded_h - h, padded_w - w  # of sizes that aren't known: there, and maybe 0 when it runs
        if pad_h or pad_w:
            x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
        shift = size // 2 if self.shifted else 0
        if shift and not self.shift_single_window:
            shift = shapes.where((padded_h, padded_w), size, 0, shift)
        how = (self.initializer, self.attention, self.dtype, self.lora)
        x = WindowAttention(self.num_heads, size, *how, name="attn")(x, shift)
        return x[:, :h, :w] if pad_h or pad_w else x


class PatchMerging(nn.Module):
    """Halve the map and double the channels: 2 x 2 tokens side by side, LayerNorm, a dense layer without bias."""

    initializer: str = "torch"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""
        c = x.shape[-1]
        x = LayerNorm(self.dtype, name="norm")(swin_ops.merge_patches(x))
        draws = initialisation.dense(self.initializer, 4 * c)
        return Dense(2 * c, use_bias=False, dtype=self.dtype, name="reduction", **draws)(x)


class SwinStage(nn.Module):
    """Blocks at one resolution, every odd one shifted; the output for the decoder, and the next stage's input."""

    depth: int
    num_heads: int
    window_size: int
    mlp_ratio: float
    drop_path_rates: tuple[float, ...]
    shift_single_window: bool
    downsample: bool
    out_norm: bool
    remat: bool = False
    initializer: str = "torch"
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """x [B, H, W, C] -> (features [B, H, W, C], normed where `out_norm`; next map, halved where `downsample`)."""
        block: Any = SwinBlock
        if train and self.remat:  # where memory matters more than time, the backward pass computes a block again
            block = nn.remat(SwinBlock, static_argnums=(2,))
        elif train and self.lora is not None:
            block = lean(SwinBlock)
        elif not train and not self.is_initializing():  # blocks alike are traced once: a prediction starts sooner
            block = nn.jit(SwinBlock, static_argnums=(2,))
        lora = self.lora if train or self.lora is None else self.lora.without_dropout()
        for j in range(self.depth):
            x = block(
                num_heads=self.num_heads,
                window_size=self.window_size,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=self.drop_path_rates[j] if train else 0.0,
                shifted=j % 2 == 1,
                shift_single_window=self.shift_single_window,
                initializer=self.initializer,
                attention=self.attention,
                dtype=self.dtype,
                lora=lora,
                name=f"blocks_{j}",
            )(x, train)
        features = LayerNorm(self.dtype, name="norm")(x) if self.out_norm else x
        following = PatchMerging(self.initializer, self.dtype, name="downsample")(x) if self.downsample else x
        return features, following


class SwinFields(nn.Module):
    """Fields of a Swin encoder, which every model that holds one has too; the defaults are granite's Swin-B.

    `shift_single_window`: shift also where the padded map is one window (granite's weights need it; the original, timm
    and SimMIM do not). How a run computes is no part of a model's architecture: `remat` names the stages (0 to 3) whose
    blocks are computed a second time in the backward pass to save memory, `initializer` how fresh weights are drawn
    (`torch` or `simmim`, see initialisation.py), `attention` whether kernels compute attention and MLPs (see
    fused/choice.py). `lora` adds low-rank updates to dense layers of the blocks (see lora.py), which a whole model has
    within its kernels.
    """

    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float = 4.0
    patch_size: int = 4
    in_channels: int = 6
    drop_path_rate: float = 0.0
    shift_single_window: bool = True
    remat: tuple[int, ...] = ()
    initializer: str = "torch"
    attention: str = "auto"
    dtype: Dtype = jnp.float32
    lora: Lora | None = None

    @nn.nowrap
    def make_encoder(self, **options: Any) -> "SwinTransformer":
        """The encoder with this module's fields; `options` are `SwinTransformer`'s own and `name`."""
        names = {field.name for field in dataclasses.fields(SwinFields)} - {"parent", "name"}
        shared = {name: getattr(self, name) for name in names}
        return SwinTransformer(**shared, **options)


class SwinTransformer(SwinFields):
    """Hierarchical encoder: one feature map a stage, at 1/4, 1/8, 1/16 ... of the image with patch 4.

    `stage_norms`: a LayerNorm on each stage's output for a decoder (granite). `final_norm`: a LayerNorm on the last
    stage's output (the original, timm, SimMIM).
    """

    stage_norms: bool = True
    final_norm: bool = False

    def setup(self) -> None:
        """Check the fields against each other and build the stages."""
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths {self.depths} and num_heads {self.num_heads} must have one entry a stage each")
        for i, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**i % heads:
                raise ValueError(f"stage {i} has {self.embed_dim * 2**i} channels, not divisible by {heads} heads")
        if unknown := sorted(set(self.remat) - set(range(len(self.depths)))):
            raise ValueError(f"remat names stages {unknown}; there are {len(self.depths)}, counted from 0")
        self.patch_embed = PatchEmbed(self.embed_dim, self.patch_size, self.dtype)
        rates = swin_ops.drop_path_rates(self.drop_path_rate, tuple(self.depths))
        self.stages = [
            SwinStage(
                depth=depth,
                num_heads=self.num_heads[i],
                window_size=self.window_size,
                mlp_ratio=self.mlp_ratio,
                drop_path_rates=tuple(rates[i]),
                shift_single_window=self.shift_single_window,
                downsample=i < len(self.depths) - 1,
                out_norm=self.stage_norms,
                remat=i in self.remat,
                initializer=self.initializer,
                attention=self.attention,
                dtype=self.dtype,
                lora=self.lora,
            )
            for i, depth in enumerate(self.depths)
        ]
        if self.final_norm:
            self.norm = LayerNorm(self.dtype)

    def embed(self, x: jax.Array) -> jax.Array:
        """Patch tokens: x [B, H, W, bands] -> [B, ceil(H/p), ceil(W/p), E]."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"the encoder takes [B, H, W, {self.in_channels}], found an image of shape {x.shape}")
        return self.patch_embed(x)

    def encode(self, tokens: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """Feature maps of patch tokens: [B, H', W', E] -> [[B, H', W', E], [B, H'/2, W'/2, 2E], ...]."""
        x, features = tokens, []
        for stage in self.stages:
            stage_features, x = stage(x, train=train)
            features.append(stage_features)
        if self.final_norm:
            features[-1] = self.norm(features[-1])
        return features

    def __call__(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """x [B, H, W, bands], z-scored -> one feature map a stage (see `encode`)."""
        return self.encode(self.embed(x), train=train)


class SwinEncoder(SwinFields):
    """An encoder alone, its parameters under `encoder` as in the whole models."""

    shift_single_window: bool = False
    stage_norms: bool = False
    final_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> list[jax.Array]:
        """x [B, H, W, bands], z-scored -> one feature map a stage."""
        encoder = self.make_encoder(stage_norms=self.stage_norms, final_norm=self.final_norm, name="encoder")
        return encoder(x, train=train)
