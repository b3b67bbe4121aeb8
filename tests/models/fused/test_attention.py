"""The kernel, interpreted, against the einsums: outputs, gradients of everything, derivatives, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.errors import ConfigError
from biomass_jax.models import swin_ops
from biomass_jax.models.fused import attention as fused_attention
from biomass_jax.models.fused import choice
from biomass_jax.models.swin import SwinTransformer

# Batch, windows down and across, heads, channels a head, window, shift: no two alike where they could be mixed up.
CASES = {
    "window 7": (3, 2, 4, 5, 16, 7, 0),
    "window 7, shifted": (2, 3, 4, 5, 16, 7, 3),
    "window 8, shifted": (3, 1, 2, 4, 32, 8, 4),
    "window 4, shifted": (2, 3, 5, 1, 64, 4, 2),
    "a single window, shifted": (2, 1, 1, 3, 32, 7, 3),
    "window 5, shifted by 1": (1, 2, 3, 2, 16, 5, 1),
}
CUDA = "__gpu$xla.gpu.triton"


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def inputs(case, dtype=np.float32):
    """Of a case: qkv, bias, and weights of the outputs."""
    batch, down, across, heads, dim, size, _ = CASES[case]
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((batch, down * size, across * size, 3 * heads * dim))
    bias = rng.standard_normal((heads, size**2, size**2)).astype(np.float32)
    weights = rng.standard_normal((*qkv.shape[:3], heads * dim))
    return jnp.asarray(qkv, dtype), jnp.asarray(bias), jnp.asarray(weights, dtype)


def ways(case):
    """Of a case: the kernel and the einsums, as functions of qkv and bias."""
    *_, size, shift = CASES[case]

    def fused(qkv, bias):
        return fused_attention.attend(qkv, bias, size, shift)

    def einsums(qkv, bias):
        height, width = qkv.shape[1:3]
        mask = swin_ops.shift_mask(height, width, size, shift) if shift else None
        windows = swin_ops.attend_windows(swin_ops.to_windows(qkv, size, shift), bias, mask)
        return swin_ops.from_windows(windows, size, shift, height, width)

    return fused, einsums


def by_loops(qkv, bias, size, shift):
    """Attention of a map in float64, token by token, from the definition."""
    batch, height, width, c = qkv.shape
    heads, dim = len(bias), c // 3 // len(bias)
    out = np.zeros((batch, height, width, heads * dim))
    for y in range(height):
        for x in range(width):
            # Rolled, this token lies at (i, j); those of its window were its neighbours before where both have, or have
            # not, been carried across the edge.
            i, j = (y - shift) % height, (x - shift) % width
            top, left = i // size * size, j // size * size
            seen = [(a, b) for a in range(top, top + size) for b in range(left, left + size)]
            places = [((a + shift) % height, (b + shift) % width) for a, b in seen]
            near = [abs(p - y) < size and abs(q - x) < size for p, q in places]
            query = (i - top) * size + j - left
            for head in range(heads):
                q, k, v = (qkv[..., part * heads * dim + head * dim :][..., :dim] for part in range(3))
                scores = np.stack([(q[:, y, x] * k[:, p, r]).sum(-1) for p, r in places], -1) * dim**-0.5
                scores = np.where(near, scores + bias[head, query], -np.inf)
                powers = np.exp(scores - scores.max(-1, keepdims=True))
                weights = powers / powers.sum(-1, keepdims=True)
                values = np.stack([v[:, p, r] for p, r in places], 1)
                out[:, y, x, head * dim : (head + 1) * dim] = np.einsum("bk,bkd->bd", weights, values)
    return out


@pytest.mark.parametrize("way", [0, 1], ids=["fused", "einsums"])
def test_both_ways_against_loops(way):
    case = "window 4, shifted"
    qkv, bias, _ = inputs(case)
    expected = by_loops(np.asarray(qkv, np.float64), np.asarray(bias, np.float64), 4, 2)
    assert relative_error(jax.jit(ways(case)[way])(qkv, bias), expected) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_einsums(case, monkeypatch):
    monkeypatch.setattr(fused_attention, "FEWEST_PROGRAMS", 10)  # so that a program sums up several windows, some none
    qkv, bias, weights = inputs(case)
    found = []
    for way in ways(case):

        def run(qkv, bias, way=way):
            out, back = jax.vjp(way, qkv, bias)
            return out, *back(weights)

        found.append(jax.jit(run)(qkv, bias))
    assert relative_error(found[0][0], found[1][0]) < 1e-6
    assert relative_error(found[0][1], found[1][1]) < 1e-5
    assert relative_error(found[0][2], found[1][2]) < 1e-5


def test_windows_are_summed_up_in_programs_that_need_not_divide_them():
    layouts = {
        (windows, heads): fused_attention._Layout(windows, 7, 7, heads, 16, 7, 0, jax.lax.Precision.HIGHEST, 512)
        for windows, heads in ((1, 3), (200, 4), (8192, 4))
    }
    assert [layout.in_a_program for layout in layouts.values()] == [1, 1, 16]
    assert [layout.tokens for layout in layouts.values()] == [64] * 3


def test_bfloat16_rounds_as_the_einsums_do():
    """The einsums in float32 are the truth: the kernel may be no further from them than the einsums in bfloat16 are."""
    case = "window 7, shifted"
    qkv, bias, weights = inputs(case, jnp.bfloat16)
    fused, einsums = ways(case)
    found = []
    for way, dtype in ((fused, jnp.bfloat16), (einsums, jnp.bfloat16), (einsums, jnp.float32)):

        def run(qkv, bias, way=way, dtype=dtype):
            out, back = jax.vjp(way, qkv, bias)
            return out, *back(weights.astype(dtype))

        found.append(jax.jit(run)(qkv.astype(dtype), bias))
    assert found[0][0].dtype == found[0][1].dtype == jnp.bfloat16
    assert found[0][2].dtype == jnp.float32
    for ours, rounded, truth in zip(*found, strict=True):
        assert 0 < relative_error(ours, truth) < max(1.2 * relative_error(rounded, truth), 2**-9)


def test_with_64_bits_on():
    case = "a single window, shifted"
    with jax.enable_x64(True):
        found = [
            jax.jit(jax.grad(lambda *of, way=way: way(*of).sum(), (0, 1)))(*inputs(case)[:2]) for way in ways(case)
        ]
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        assert relative_error(ours, theirs) < 1e-5


def test_jvp_vmap_and_their_mixtures():
    case = "a single window, shifted"
    qkv, bias, weights = inputs(case)
    two = jnp.stack([qkv, 0.5 * qkv]), jnp.stack([bias, -bias])
    found = []
    for way in ways(case):

        def value(qkv, bias, way=way):
            return (way(qkv, bias) * weights).sum()

        def derivatives(qkv, bias, two, way=way, value=value):
            return {
                "jvp": jax.jvp(way, (qkv, bias), (jnp.cos(qkv), jnp.sin(bias)))[1],
                "jacfwd": jax.jacfwd(lambda amounts: value(qkv + amounts.sum(), bias * (1 + amounts[0])))(jnp.ones(2)),
                "vmap of grad": jax.vmap(jax.grad(value, 1))(*two),
                "grad of vmap": jax.grad(lambda qkv: jax.vmap(value)(qkv, two[1]).sum())(two[0]),
                "grad of a part": jax.grad(value)(qkv, bias),
                "grad, computed twice": jax.grad(jax.checkpoint(value), 1)(qkv, bias),
            }

        found.append(jax.jit(derivatives)(qkv, bias, two))
    errors = {name: relative_error(found[0][name], found[1][name]) for name in found[0]}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def swin():
    """A whole Swin with padded maps, dropping paths, both ways: its features and the gradients of all weights."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((3, 44, 28, 6)).astype(
        np.float32
    )  # 11 x 7 tokens, padded to 12 x 8; then 6 x 4 to 8 x 4
    with jax.default_matmul_precision("highest"):
        variables = jax.jit(lambda: SwinTransformer(**SWIN).init(jax.random.key(0), image))()
        variables = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), variables)
        found = {}
        for way in ("einsum", "fused"):
            model = SwinTransformer(**SWIN, attention=way, drop_path_rate=0.2)

            def loss(variables, model=model):
                maps = model.apply(variables, image, train=True, rngs={"drop_path": jax.random.key(1)})
                return sum((one * jnp.cos(jnp.arange(one.size).reshape(one.shape))).sum() for one in maps), maps

            (_, maps), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
            inferred = jax.jit(model.apply)(variables, image)
            found[way] = {"maps": maps, "inferred": inferred, "gradients": bundle.flatten(gradients)}
    return found


def test_a_whole_swin_both_ways(swin):
    for which in ("maps", "inferred"):
        for ours, theirs in zip(swin["fused"][which], swin["einsum"][which], strict=True):
            assert relative_error(ours, theirs) < 2e-6  # two stages of two blocks


def test_gradients_of_all_weights_of_a_swin(swin):
    ours, theirs = swin["fused"]["gradients"], swin["einsum"]["gradients"]
    assert list(ours) == list(theirs)
    assert sum(path.endswith("relative_position_bias_table") for path in ours) == 4
    for path, leaf in theirs.items():
        found, leaf = np.asarray(ours[path]), np.asarray(leaf)
        if path.endswith("qkv/bias"):  # the keys' third is truly zero
            found, leaf = found.reshape(3, -1)[[0, 2]], leaf.reshape(3, -1)[[0, 2]]
        assert relative_error(found, leaf) < 1e-5, path


def lowered_for_cuda(function, *arguments):
    try:
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # from jax 0.11 on it asks what card it is for
        if "No supported GPU devices found" not in str(error):
            raise
        pytest.skip("this version of jax lowers for the card that is there, and there is none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["window 7, shifted", "window 8, shifted", "window 4, shifted"])
def test_lowering_for_cuda(case, dtype):
    qkv, bias, weights = inputs(case, dtype)
    counts = []
    for way in ways(case):

        def back(qkv, bias, weights, way=way):
            return jax.vjp(way, qkv, bias)[1](weights)

        texts = lowered_for_cuda(way, qkv, bias), lowered_for_cuda(back, qkv, bias, weights)
        counts.append(
            [[text.count(word) for word in (CUDA, "stablehlo.transpose", "stablehlo.dot_general")] for text in texts]
        )
    # Of each block's attention one call forward, one backward, no product and no array turned around elsewhere.
    assert counts[0] == [[1, 0, 0], [1, 0, 0]]
    for calls, transposes, products in counts[1]:
        assert calls == 0 and transposes > 5 and products > 1


def test_lowering_a_whole_model_for_cuda():
    """No window is cut out any more; what is turned around still are the patches, of which the weights' gradients."""
    model = SwinTransformer(**SWIN, attention="fused")
    image = jax.ShapeDtypeStruct((2, 64, 64, 6), jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(image.shape)))
    counts = {}
    for way in ("fused", "einsum"):
        other = model.clone(attention=way)

        def loss(variables, image, other=other):
            return sum(one.sum() for one in other.apply(variables, image, train=True))

        text = lowered_for_cuda(jax.grad(loss), variables, image)
        counts[way] = text.count(CUDA), text.count("stablehlo.transpose")
    # Blocks alike share their functions: two kinds (shifted and not) of two stages, forward and backward.
    assert counts["fused"][0] == 8 and counts["einsum"][0] == 0
    assert counts["fused"][1] < counts["einsum"][1] / 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"window_size": 9}, "windows are 9 tokens wide, and the kernel takes 1 to 8"),
        ({"num_heads": 4}, "a head has 12 channels, and the kernel takes 16, 32, 64"),
        ({"shape": (1, 13, 14, 48)}, "a map of 13 x 14 tokens isn't cut into windows of 7 without a rest"),
        ({"dtype": "float16"}, "the dtype is float16, and the kernel takes float32, bfloat16"),
        ({"shape": (2**17, 14, 14, 48)}, "are 3,699,376,128 numbers, and the kernel takes 1 to 2,147,483,647"),
        ({"shape": (0, 14, 14, 48)}, "are 0 numbers, and the kernel takes 1 to 2,147,483,647"),
    ],
)
def test_what_the_kernel_does_not_take(changed, words, monkeypatch):
    given = {"shape": (1, 14, 14, 48), "num_heads": 3, "window_size": 7, "dtype": "float32"}
    assert fused_attention.why_not(**given) == ""
    assert words in fused_attention.why_not(**given | changed)
    with pytest.raises(ConfigError, match=f"attention is 'fused', but .*{words}; expected auto or einsum"):
        choice.attention_is_fused("fused", **given | changed)
    assert not choice.attention_is_fused("einsum", **given | changed)
    monkeypatch.setattr(choice, "why_not_here", lambda: "")
    assert not choice.attention_is_fused("auto", **given | changed)
    assert choice.attention_is_fused("auto", **given)
