"""What a table of keys can say and do: sort a checkpoint's keys, name the axes' order, write the keys out again.

A table names modules; a module's kind says which tensors it holds and how each is laid out. `{i}` stands for a number
and `{i-1}` for the number before it. Rows are in the order in which PyTorch lists a model's tensors, so that the same
table writes a checkpoint. Paths start with the collection: `params/...` or `batch_stats/...`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np

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
class TensorRole:
    """One tensor of a kind of module: name in torch, role, and for a tensor its collection, name here and transform."""

    torch: str
    role: str = TENSOR
    ours: str = ""
    transform: Transform = VECTOR
    collection: str = "params"


_BIAS = TensorRole("bias", TENSOR, "bias")
NORM = (TensorRole("weight", TENSOR, "scale"), _BIAS)
UNFOLD_NORM = (TensorRole("weight", TENSOR, "scale", UNFOLD_VECTOR), TensorRole("bias", TENSOR, "bias", UNFOLD_VECTOR))
BATCH_NORM = (
    *NORM,
    TensorRole("running_mean", TENSOR, "mean", VECTOR, "batch_stats"),
    TensorRole("running_var", TENSOR, "var", VECTOR, "batch_stats"),
    TensorRole("num_batches_tracked", COUNTER, "count", VECTOR, "batch_stats"),
)
CONV_ALONE = (TensorRole("weight", TENSOR, "kernel", CONV_KERNEL),)
CONV = (*CONV_ALONE, _BIAS)
LINEAR_ALONE = (TensorRole("weight", TENSOR, "kernel", LINEAR_KERNEL),)
LINEAR = (*LINEAR_ALONE, _BIAS)
UNFOLD_LINEAR = (TensorRole("weight", TENSOR, "kernel", UNFOLD_KERNEL),)
POSITION_BIAS = (
    TensorRole("relative_position_bias_table", TENSOR, "relative_position_bias_table", TABLE),
    TensorRole("relative_position_index", BUFFER),
)
SHIFT_MASK = (TensorRole("attn_mask", BUFFER),)
MASK_TOKEN = (TensorRole("mask_token", TENSOR, "mask_token", TOKEN),)
MASK_TOKEN_LEFT = (TensorRole("mask_token", UNUSED),)
CLASSIFIER = (TensorRole("weight", UNUSED), TensorRole("bias", UNUSED))

Modules = tuple[tuple[str, str, tuple[TensorRole, ...]], ...]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a layout: templates of its torch key and of its path here (empty where it has none)."""

    key: str
    path: str
    role: str
    transform: Transform


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
    spellings: tuple[tuple[str, str], ...] = ((r"^module\.", ""),)
    shift_single_window: bool = False

    @cached_property
    def rows(self) -> tuple[TensorRow, ...]:
        """The table, one row a tensor."""
        return tuple(
            TensorRow(
                f"{module}.{part.torch}",
                "/".join(filter(None, (part.collection, path, part.ours))) if part.ours else "",
                part.role,
                part.transform,
            )
            for module, path, kind in self.modules
            for part in kind
        )

    def canonical(self, key: str) -> str:
        """The table's spelling of a file's key."""
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
        unknown: keys that the table does not have.
        duplicates: groups of keys that are spellings of one tensor.
    """

    layout: Layout
    tensors: dict[str, tuple[str, Transform]] = field(default_factory=dict)
    counters: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, ...]] = field(default_factory=list)


def match(layout: Layout, keys: Iterable[str]) -> Match:
    """Sort a file's keys by a layout's table; nothing is raised, the result says what does not fit."""
    result = Match(layout)
    spellings: dict[str, list[str]] = {}
    for key in keys:
        spellings.setdefault(layout.canonical(key), []).append(key)
    result.duplicates = [tuple(group) for group in spellings.values() if len(group) > 1]
    for canonical, (key, *_) in spellings.items():
        row, numbers = _find(layout, canonical)
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


def name_list(names: Iterable[str], limit: int = 20) -> str:
    """Names in one line, the tail of a long list as a count."""
    names = list(names)
    if not names:
        return "none"
    more = f" ... and {len(names) - limit} more ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
