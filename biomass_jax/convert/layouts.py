"""The known layouts of PyTorch checkpoints, each one table, and what a table can do: sort keys, write them out again.

A table names modules; a module's kind says which tensors it holds and how each is laid out. `{i}` stands for a number
and `{i-1}` for the number before it. Rows are in the order in which PyTorch lists a model's tensors, so that the same
table writes a checkpoint. Paths start with the collection: `params/...` or `batch_stats/...`.

Sources: the released granite checkpoint (terratorch 0.99.2 key names), microsoft/SimMIM, microsoft/Swin-Transformer,
timm 1.0 (its `features_only` models write `layers_0` for `layers.0`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np

from biomass_jax.errors import ConvertError, name_list

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How a torch tensor becomes ours.

    Attributes:
        axes: our axes, as numbers of torch's axes.
        unfold: our axis 0 runs over a 2 x 2 square of C channels, which granite's PatchMerging takes from torch's
            `unfold` (index = c * 4 + row * 2 + column), while the model wants blocks of C at (row, column) = (0,0),
            (1,0), (0,1), (1,1), the original Swin's order.
    """

    axes: tuple[int, ...]
    unfold: bool = False

    def forward(self, x: np.ndarray) -> np.ndarray:
        """A torch tensor in our layout, C-contiguous."""
        x = x.transpose(self.axes)
        if self.unfold:
            x = x.reshape(x.shape[0] // 4, 2, 2, *x.shape[1:]).swapaxes(0, 2).reshape(x.shape)
        return np.ascontiguousarray(x)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Undo `forward`, C-contiguous."""
        if self.unfold:
            x = x.reshape(2, 2, x.shape[0] // 4, *x.shape[1:]).swapaxes(0, 2).reshape(x.shape)
        return np.ascontiguousarray(x.transpose(np.argsort(self.axes)))

    def shape(self, torch_shape: Shape) -> Shape | None:
        """Our shape of a torch tensor, None where it cannot be such a tensor."""
        if len(torch_shape) != len(self.axes):
            return None
        ours = tuple(torch_shape[axis] for axis in self.axes)
        return None if self.unfold and ours[0] % 4 else ours

    def torch_shape(self, shape: Shape) -> Shape:
        """Torch's shape of one of our tensors."""
        return tuple(shape[axis] for axis in np.argsort(self.axes))


VECTOR = Transform((0,))
TABLE = Transform((0, 1))  # relative position biases: (rows, heads) on both sides
TOKEN = Transform((0, 1, 2))
LINEAR_KERNEL = Transform((1, 0))  # (out, in) -> (in, out); the order (3, heads, dim) of qkv's outputs stays
CONV_KERNEL = Transform((2, 3, 1, 0))  # OIHW -> HWIO
UNFOLD_VECTOR = Transform((0,), unfold=True)
UNFOLD_KERNEL = Transform((1, 0), unfold=True)

# What a row's tensor is: one of ours, a counter kept in the provenance, a buffer computed anew, or a part left out.
TENSOR, COUNTER, BUFFER, UNUSED = "tensor", "counter", "buffer", "unused"


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a kind of module, by its names within the module, or of a layout, by templates of its whole names.

    Attributes:
        key: in torch.
        path: here; empty where it has none.
        transform: from one to the other.
        role: what it is.
        collection: `params` or `batch_stats`, the first part of a layout's path.
    """

    key: str
    path: str = ""
    transform: Transform = VECTOR
    role: str = TENSOR
    collection: str = "params"


_BIAS = TensorRow("bias", "bias")
NORM = (TensorRow("weight", "scale"), _BIAS)
UNFOLD_NORM = (TensorRow("weight", "scale", UNFOLD_VECTOR), TensorRow("bias", "bias", UNFOLD_VECTOR))
BATCH_NORM = (
    *NORM,
    TensorRow("running_mean", "mean", collection="batch_stats"),
    TensorRow("running_var", "var", collection="batch_stats"),
    TensorRow("num_batches_tracked", "count", role=COUNTER, collection="batch_stats"),
)
CONV_ALONE = (TensorRow("weight", "kernel", CONV_KERNEL),)
CONV = (*CONV_ALONE, _BIAS)
LINEAR_ALONE = (TensorRow("weight", "kernel", LINEAR_KERNEL),)
LINEAR = (*LINEAR_ALONE, _BIAS)
UNFOLD_LINEAR = (TensorRow("weight", "kernel", UNFOLD_KERNEL),)
POSITION_BIAS = (
    TensorRow("relative_position_bias_table", "relative_position_bias_table", TABLE),
    TensorRow("relative_position_index", role=BUFFER),
)
SHIFT_MASK = (TensorRow("attn_mask", role=BUFFER),)
MASK_TOKEN = (TensorRow("mask_token", "mask_token", TOKEN),)
MASK_TOKEN_LEFT = (TensorRow("mask_token", role=UNUSED),)
CLASSIFIER = (TensorRow("weight", role=UNUSED), TensorRow("bias", role=UNUSED))

Modules = tuple[tuple[str, str, tuple[TensorRow, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints.

    Attributes:
        name: shown to users and kept in the bundle's provenance.
        task: the bundle's task.
        modules: (torch module, path here, kind) in torch's order.
        spellings: (regular expression, replacement) that turn other spellings of a key into the table's.
        shift_single_window: whether this family's Swin shifts windows on a map of a single window.
    """

    name: str
    task: str
    modules: Modules
    spellings: tuple[tuple[str, str], ...] = ()
    shift_single_window: bool = False

    @cached_property
    def rows(self) -> tuple[TensorRow, ...]:
        """The table, one row a tensor."""
        return tuple(
            replace(
                row,
                key=f"{module}.{row.key}",
                path="/".join(filter(None, (row.collection, path, row.path))) if row.path else "",
            )
            for module, path, kind in self.modules
            for row in kind
        )

    def canonical(self, key: str) -> str:
        """The table's spelling of a file's key."""
        key, _ = unwrap(key)
        for pattern, replacement in self.spellings:
            key = re.sub(pattern, replacement, key)
        return key

    def key_of(self, path: str) -> str:
        """The torch key of one of our paths; the path itself where this layout has none such."""
        for row in self.rows:
            # The inverse of `{i-1}`: the number in the path is one less than the one in the key.
            if row.path and (found := _pattern(row.path).fullmatch(path)):
                shift = {name: int(offset or 0) for name, offset in _PLACEHOLDER.findall(row.path)}
                return _fill(row.key, {name: int(value) - shift[name] for name, value in found.groupdict().items()})
        return path


# What is put around a model writes its name into the keys: torch.compile, DataParallel and its distributed kind, FSDP,
# activation checkpointing, Lightning's strategies...
_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# ...and the training module that holds it, in front only.
_HOLDERS = re.compile(r"((?:(?:model|net|network)\.)*)(.*)", re.DOTALL)
# What a training module keeps beside the model: losses and metrics, by the names that they are given.
_LOSS = re.compile(
    r"""(?ix) (?:\w+_)? (?:criterions?|criteria|loss|losses|metrics?)
        (?:_?(?:fns?|func|function|module|layer|train|val|valid|test|weights?|\d+))* (?:\..+)?
    | (?:train|val|valid|validation|test)_\w+ \..+
    | (?:rmse|mse|mae|mape|r2|r2_?score|accuracy|acc|iou|f1|psnr|ssim|lpips) \..+
    | n_averaged  # of torch's AveragedModel
    """
)


def unwrap(key: str) -> tuple[str, list[str]]:
    """A key without what is put around a model, and the names that were taken off: ('norm.bias', ['_orig_mod'])."""
    holders, plain = _HOLDERS.fullmatch(_WRAPPER.sub("", key)).groups()  # type: ignore[union-attr]  # fits every text
    return plain, [*_WRAPPER.findall(key), *holders.split(".")[:-1]]


_PLACEHOLDER = re.compile(r"\{(\w)([+-]\d+)?\}")


@lru_cache(maxsize=2048)
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression; numbers are written without leading zeros."""
    text, end = "", 0
    for found in _PLACEHOLDER.finditer(template):
        text += re.escape(template[end : found.start()]) + rf"(?P<{found[1]}>0|[1-9]\d{{0,3}})"
        end = found.end()
    return re.compile(text + re.escape(template[end:]))


def _fill(template: str, numbers: Mapping[str, int]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(numbers[found[1]] + int(found[2] or 0)), template)


@dataclass
class Match:
    """A checkpoint's keys sorted by a layout's table.

    Attributes:
        tensors: our path -> (key in the file, transform), in the file's order.
        counters: our path -> key in the file.
        buffers: keys dropped because their content follows from the shapes.
        unused: keys dropped because the model has no such part (a classifier).
        losses: keys dropped because their names say that they belong to a loss or a metric.
        unknown: keys that the table does not have.
        duplicates: groups of keys that are spellings of one tensor.
        wrappers: names that were taken off the keys (`_orig_mod`, `module`), and off how many keys.
    """

    layout: Layout
    tensors: dict[str, tuple[str, Transform]] = field(default_factory=dict)
    counters: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, ...]] = field(default_factory=list)
    wrappers: Counter[str] = field(default_factory=Counter)


def match(layout: Layout, keys: Iterable[str]) -> Match:
    """Sort a file's keys by a layout's table; nothing is raised, the result says what does not fit."""
    result = Match(layout)
    spellings: dict[str, list[str]] = {}
    for key in keys:
        spellings.setdefault(layout.canonical(key), []).append(key)
        result.wrappers.update(set(unwrap(key)[1]))
    for canonical, (key, *others) in spellings.items():
        row, numbers = _find(layout, canonical)
        if row is None and _LOSS.fullmatch(canonical):
            result.losses += [key, *others]
            continue
        if others:
            result.duplicates.append((key, *others))
        if row is None:
            result.unknown.append(key)
        elif row.role == TENSOR:
            result.tensors[_fill(row.path, numbers)] = (key, row.transform)
        elif row.role == COUNTER:
            result.counters[_fill(row.path, numbers)] = key
        else:
            (result.buffers if row.role == BUFFER else result.unused).append(key)
    return result


def _find(layout: Layout, key: str) -> tuple[TensorRow | None, dict[str, int]]:
    for row in layout.rows:
        if found := _pattern(row.key).fullmatch(key):
            return row, {name: int(value) for name, value in found.groupdict().items()}
    return None, {}


def expand(
    rows: Iterable[TensorRow], count: Callable[[str, Mapping[str, int]], int], numbers: Mapping[str, int] | None = None
) -> Iterator[tuple[TensorRow, str, str]]:
    """Write a layout's rows out in torch's order: (row, key, path) a tensor.

    `count(name, numbers)` is how many values the placeholder `name` takes where those before it have `numbers`; rows
    next to each other that share a placeholder run through it together. Parts that a model lacks (a downsample after
    the last stage) are written out too.
    """
    known = numbers or {}

    def next_placeholder(row: TensorRow) -> str:
        return next((name for name, _ in _PLACEHOLDER.findall(row.key) if name not in known), "")

    for name, group in groupby(rows, next_placeholder):
        block = tuple(group)
        if not name:
            yield from ((row, _fill(row.key, known), _fill(row.path, known)) for row in block)
            continue
        for value in range(count(name, known)):
            yield from expand(block, count, {**known, name: value})


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
    spellings=((r"^encoder\.stages\.", "encoder.stages_"),),
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
    spellings=((r"^layers_", "layers."),),
)


def detect(keys: Iterable[str]) -> Layout:
    """The layout of a checkpoint, from its keys.

    Raises:
        ConvertError: no layout, or two at once.
    """
    names = [unwrap(key)[0] for key in keys]
    simmim = SIMMIM if any(name.startswith("decoder.") for name in names) else SIMMIM_ENCODER
    found = [
        layout
        for layout, pattern in ((GRANITE, r"encoder\.stages[._]\d"), (simmim, r"encoder\.layers\.\d"))
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
        f"(layers.0...). Found keys: {name_list(names)}"
    )
