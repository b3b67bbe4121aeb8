"""The PyTorch original's model in plain layers, for the benchmarks to race: Swin-B, UPerNet, PixelShuffle head.

It computes as the original does: windows cut by view and permute, the relative position bias gathered in each forward,
the shift mask added to the scores, `torch.roll`, NCHW convolutions in decoder and head. Modules have the names of the
released checkpoint (tests/golden/granite_swin_b_keys.txt), so that our converter's export loads strictly, and `check`
compares the two on shared weights before anything is timed. The formulas are those of the papers that
biomass_jax/models names.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of max|ours - rival| / max|rival|, float32; two right ports were seen to differ by 2e-6 on trained weights.
TOLERANCE = 1e-5


def shift_mask(height: int, width: int, window: int) -> Tensor:
    """Additive mask of a shifted block, [windows, w * w, w * w]: 0 within a region, -100 between regions."""
    regions = torch.zeros(1, height, width, 1)
    spans = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    for number, (rows, cols) in enumerate((r, c) for r in spans for c in spans):
        regions[:, rows, cols] = number
    flat = cut_windows(regions, window).squeeze(-1)
    return (flat[:, None, :] != flat[:, :, None]).float() * -100.0


def cut_windows(x: Tensor, window: int) -> Tensor:
    """x [B, H, W, C] -> [B * windows, w * w, C]."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, c)


def join_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `cut_windows`: [B * windows, w * w, C] -> [B, H, W, C]."""
    x = windows.view(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, windows.shape[-1])


class TorchDropPath(nn.Module):
    """Drops a sample's branch with probability `rate` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> same."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class TorchWindowAttention(nn.Module):
    """Attention within windows."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        axis = torch.arange(window)
        place = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + window - 1
        self.register_buffer("relative_position_index", apart[0] * (2 * window - 1) + apart[1])
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B * windows, tokens, C], mask [windows, tokens, tokens] -> [B * windows, tokens, C]."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(b // windows, windows, self.heads, n, n) + mask[None, :, None]
            scores = scores.view(-1, self.heads, n, n)
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class ShiftedWindows(nn.Module):
    """Padding, shift and windows around the attention; the mask of the usual image size is a buffer, as in timm."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, side: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.w_msa = TorchWindowAttention(dim, heads, window)
        self.masked_side = -(-side // window) * window
        if shift:
            mask = shift_mask(self.masked_side, self.masked_side, window)
            self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> same."""
        _, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, -w % self.window, 0, -h % self.window))
        padded_h, padded_w = x.shape[1:3]
        mask = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            usual = padded_h == padded_w == self.masked_side
            mask = self.mask if usual else shift_mask(padded_h, padded_w, self.window).to(x)
        windows = self.w_msa(cut_windows(x, self.window), mask)
        x = join_windows(windows, self.window, padded_h, padded_w)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :h, :w].contiguous()


class FeedForward(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.GELU()), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> same."""
        return self.layers(x)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, dim: int, heads: int, window: int, hidden: int, drop_path: float, shift: int, side: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ShiftedWindows(dim, heads, window, shift, side)
        self.ffn = FeedForward(dim, hidden)
        self.drop_path = TorchDropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class TorchPatchMerging(nn.Module):
    """Halve the map by `unfold`, the channel-major order of the released weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""
        b, h, w, _ = x.shape
        x = F.pad(x.permute(0, 3, 1, 2), (0, w % 2, 0, h % 2))
        x = F.unfold(x, 2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(x)).view(b, (h + 1) // 2, (w + 1) // 2, -1)


class Stage(nn.Module):
    """Blocks at one resolution; the normed output for the decoder, and the next stage's input."""

    def __init__(self, dim: int, heads: int, window: int, hidden: int, rates: list[float], side: int, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, heads, window, hidden, rate, window // 2 if j % 2 else 0, side) for j, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim)
        self.downsample = None if last else TorchPatchMerging(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H, W, C] -> (features [B, C, H, W], next map [B, H/2, W/2, 2C])."""
        for block in self.blocks:
            x = block(x)
        features = self.norm(x).permute(0, 3, 1, 2).contiguous()
        return features, x if self.downsample is None else self.downsample(x)


class TorchPatchEmbed(nn.Module):
    """Convolution of patches, then a norm; the image is replicated to a multiple of the patch."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, bands, H, W] -> [B, ceil(H/p), ceil(W/p), E]."""
        h, w = x.shape[2:]
        if h % self.patch or w % self.patch:
            x = F.pad(x, (0, -w % self.patch, 0, -h % self.patch), mode="replicate")
        x = self.projection(x)
        b, c, h, w = x.shape
        return self.norm(x.flatten(2).transpose(1, 2)).view(b, h, w, c)


class Encoder(nn.Module):
    """Swin."""

    def __init__(self, fields: dict[str, Any], img_size: int) -> None:
        super().__init__()
        dim, depths, patch = fields["embed_dim"], fields["depths"], fields["patch_size"]
        self.patch_embed = TorchPatchEmbed(fields["in_channels"], dim, patch)
        rates = np.linspace(0, fields["drop_path_rate"], sum(depths)).tolist()
        for i, depth in enumerate(depths):
            width = dim * 2**i
            mine, rates = rates[:depth], rates[depth:]
            side, last, hidden = -(-img_size // patch // 2**i), i == len(depths) - 1, int(width * fields["mlp_ratio"])
            stage = Stage(width, fields["num_heads"][i], fields["window_size"], hidden, mine, side, last)
            self.add_module(f"stages_{i}", stage)
        self.count = len(depths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, bands, H, W] -> one map [B, C, H', W'] a stage."""
        x, found = self.patch_embed(x), []
        for i in range(self.count):
            features, x = self.get_submodule(f"stages_{i}")(x)
            found.append(features)
        return found


class TorchConvNormRelu(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, channels: int, features: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, features, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, features, H, W]."""
        return F.relu(self.norm(self.conv(x)))


def resized(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, H, W] at another map's size, corners aligned."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    """UPerNet."""

    def __init__(self, widths: list[int], channels: int, scales: list[int]) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), TorchConvNormRelu(widths[-1], channels, 1)) for scale in scales
        )
        self.bottleneck = TorchConvNormRelu(widths[-1] + len(scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(TorchConvNormRelu(width, channels, 1) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(TorchConvNormRelu(channels, channels, 3) for _ in widths[:-1])
        self.fpn_bottleneck = TorchConvNormRelu(len(widths) * channels, channels, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps, finest first -> [B, channels, H, W] of the finest."""
        coarsest = features[-1]
        pooled = [resized(module(coarsest), coarsest) for module in self.psp_modules]
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features[:-1], strict=True)]
        maps.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + resized(maps[i], maps[i - 1])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, maps[:-1], strict=True)] + [maps[-1]]
        outputs = outputs[:1] + [resized(x, outputs[0]) for x in outputs[1:]]
        return self.fpn_bottleneck(torch.cat(outputs, dim=1))


class TorchUpscale(nn.Module):
    """Convolution, PixelShuffle, BatchNorm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        return F.relu(self.bn(F.pixel_shuffle(self.conv(x), 2)))


class Head(nn.Module):
    """Upscaling, channel dropout, one value a pixel, ReLU."""

    def __init__(self, channels: int, layers: int, dropout: float) -> None:
        super().__init__()
        upscale = nn.Sequential(*(TorchUpscale(channels) for _ in range(layers)))
        self.head = nn.Sequential(upscale, nn.Dropout2d(dropout), nn.Conv2d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, 1, 4H, 4W]."""
        return F.relu(self.head(x))


class Model(nn.Module):
    """Biomass from z-scored bands; `fields` are `BiomassModel`'s, `img_size` the side whose masks are kept."""

    def __init__(self, fields: dict[str, Any], img_size: int = 224) -> None:
        super().__init__()
        widths = [fields["embed_dim"] * 2**i for i in range(len(fields["depths"]))]
        self.encoder = Encoder(fields, img_size)
        self.decoder = Decoder(widths, fields["decoder_channels"], fields["pool_scales"])
        self.head = Head(fields["decoder_channels"], fields["upscale_layers"], fields["head_dropout"])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, bands, H, W] -> [B, H, W], Mg/ha."""
        y = self.head(self.decoder(self.encoder(x)))
        if y.shape[2:] != x.shape[2:]:
            y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return y[:, 0]


def load(checkpoint: Path, fields: dict[str, Any]) -> Model:
    """A model in evaluation mode with the weights of a checkpoint that `biomass_jax.convert` exported.

    Args:
        checkpoint: the file.
        fields: the bundle's architecture.

    Raises:
        RuntimeError: a tensor is missing, left over or of another shape.
    """
    model = Model(fields)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model.eval()


def rmse(prediction: Tensor, label: Tensor) -> Tensor:
    """The original's loss: both [B, H, W], Mg/ha, label -1 for none; the root of the mean over labelled pixels."""
    mask = (label != -1).to(prediction.dtype)
    return torch.sqrt((mask * (prediction - label) ** 2).sum() / (mask.sum() + 1.19e-7))


def optimizer(model: nn.Module, device: str) -> torch.optim.AdamW:
    """The original's AdamW, decay on every parameter; on a GPU in torch's fused form, its fastest."""
    rate, decay = 3.1406904191973693e-4, 0.03283253068408954
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=device == "cuda")


def check(checkpoint: Path, shared: Path) -> dict[str, float]:
    """Compare with our output on the same weights and images.

    Args:
        checkpoint: exported weights.
        shared: .npz of `fields` (JSON), `images` [B, H, W, bands] z-scored and `ours` [B, H, W].

    Raises:
        SystemExit: they differ by more than `TOLERANCE`, or the output says nothing.
    """
    with np.load(shared) as arrays:
        model = load(checkpoint, json.loads(str(arrays["fields"])))
        with torch.inference_mode():
            theirs = model(torch.from_numpy(arrays["images"].transpose(0, 3, 1, 2).copy())).numpy()
        ours = arrays["ours"]
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if theirs.std() == 0 or not error <= TOLERANCE:
        raise SystemExit(f"the rival differs from ours by {error:.1e} of the largest value; at most {TOLERANCE:.0e}")
    return {"error": error, "tolerance": TOLERANCE, "mean": float(theirs.mean()), "std": float(theirs.std())}
