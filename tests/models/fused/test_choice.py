"""When kernels compute: by machine, by trying them, by shape, by what was asked for."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomass_jax import bundle
from biomass_jax.errors import ConfigError, PredictionError
from biomass_jax.models.build import architecture_of, build_module
from biomass_jax.models.fused import attention, choice, mlp
from biomass_jax.prediction.forward import Forward
from biomass_jax.runtime import mesh as sharding
from tests.models.fused.test_attention import relative_error


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


class Card:
    """Stands for a device."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    ("backend", "fields", "words"),
    [
        ("gpu", {"compute_capability": "9.0"}, ""),
        ("gpu", {"compute_capability": "12.0"}, ""),
        ("gpu", {"compute_capability": "7.5"}, "found 7.5"),
        ("gpu", {"compute_capability": "gfx942"}, "found gfx942"),
        ("gpu", {}, "found none"),
        ("tpu", {}, "JAX computes on tpu here"),
        ("cpu", {}, "JAX computes on cpu here"),
    ],
)
def test_where_the_kernel_runs(backend, fields, words, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [Card(**fields)])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(choice, "fault_here", lambda: "")
    assert words in choice.why_not_here() and bool(words) == bool(choice.why_not_here())
    for chosen in choice.CHOICES:
        refused = chosen == "fused" and words
        expected = pytest.raises(ConfigError, match="config.attention is 'fused', but they ") if refused else None
        with expected or contextlib.nullcontext():
            choice.check_here(chosen, "config.attention")
    assert choice.attention_is_fused("auto", (1, 14, 14, 48), 3, 7, "float32") == (not words)


@pytest.fixture
def card(monkeypatch):
    """A machine that seems to have a card for the kernel, which hasn't been tried yet."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Card(compute_capability="9.0")])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tried = choice.fault_here
    tried.cache_clear()
    yield
    tried.cache_clear()


def chosen_in_a_program():
    """What `auto` is where a program is traced."""
    seen = []
    jax.jit(lambda x: seen.append(choice.attention_is_fused("auto", (1, 14, 14, 48), 3, 7, "float32")) or x)(
        jnp.zeros(2)
    )
    return seen


def test_the_kernel_is_tried_once_before_it_is_trusted(card, monkeypatch, caplog):
    tries = []
    monkeypatch.setattr(attention, "attend", lambda *given, own=attention.attend: tries.append(1) or own(*given))
    assert chosen_in_a_program() == [True] and tries
    count = len(tries)
    assert chosen_in_a_program() == [True] and len(tries) == count and caplog.text == ""


def test_a_broken_mlp_is_noticed_too(card, monkeypatch, caplog):
    own = mlp.add_mlp
    monkeypatch.setattr(mlp, "add_mlp", lambda x, weights: own(x, weights).at[-1].add(1))
    assert chosen_in_a_program() == [False]
    assert "attention and MLPs by plain JAX: the MLP's kernel is off by" in caplog.text


def test_mlps_are_chosen_by_shape(card, monkeypatch):
    monkeypatch.setattr(choice, "fault_here", lambda: "")
    narrow, wide = ((2, 7, 7, 128), 512, "bfloat16"), ((2, 7, 7, 512), 2048, "bfloat16")
    assert choice.mlp_is_fused("fused", *narrow) and choice.mlp_is_fused("auto", *narrow)
    assert not choice.mlp_is_fused("einsum", *narrow)
    assert not choice.mlp_is_fused("fused", *wide) and not choice.mlp_is_fused("auto", *wide)


@pytest.mark.parametrize(("processes", "placed"), [(1, False), (1, True), (2, True)])
def test_on_several_devices_a_program_has_to_say_how_it_is_split(processes, placed, card, monkeypatch):
    mesh = sharding.create_mesh(jax.devices()[:1])  # as the mesh is named, not how large it is, that is asked
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(choice, "fault_here", lambda: "")
    with sharding.traced_for(sharding.batch_sharding(mesh) if placed else None):
        assert chosen_in_a_program() == [placed and processes == 1]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda qkv, bias, size, shift, own: 1 / 0, "the attention's kernel fails on this machine: division by zero"),
        (lambda qkv, bias, size, shift, own: own(qkv, bias, size, 0), "the attention's kernel is off by"),
        (lambda qkv, bias, size, shift, own: own(qkv, jax.lax.stop_gradient(bias), size, shift), "is off by 100.0%"),
        (lambda qkv, bias, size, shift, own: jnp.nan * own(qkv, bias, size, shift), "is off by nan%"),
    ],
)
def test_a_kernel_that_does_not_work_here_is_left_alone_with_a_word(card, monkeypatch, caplog, broken, says):
    own = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *given: broken(*given, own))
    assert chosen_in_a_program() == [False]
    assert "attention and MLPs by plain JAX: the attention's kernel" in caplog.text and says in caplog.text
    with pytest.raises(ConfigError, match="config.attention is 'fused', but the attention's kernel"):
        choice.check_here("fused", "config.attention")


def test_auto_is_einsum_on_this_machine_and_says_nothing_in_bundles():
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    fields = {"embed_dim": 16, "depths": (1,), "num_heads": (1,), "window_size": 4}
    image = jnp.zeros((1, 32, 32, 6))
    modules = {way: build_module("encoder", fields, attention=way) for way in choice.CHOICES}
    variables = jax.jit(modules["fused"].init)(jax.random.key(0), image)
    texts = {way: str(jax.make_jaxpr(module.apply)(variables, image)) for way, module in modules.items()}
    assert texts["auto"] == texts["einsum"]
    assert ["pallas_call" in texts[way] for way in ("einsum", "fused")] == [False, True]
    assert len({str(architecture_of(module)) for module in modules.values()}) == 1
    assert "attention" not in architecture_of(modules["fused"])
    with pytest.raises(ConfigError, match="attention is 'flash'; expected one of auto, einsum, fused"):
        build_module("encoder", fields, attention="flash").apply(variables, image)


def test_predictions_take_it_by_name(tmp_path, monkeypatch):
    pytest.importorskip("rasterio")  # machines that are lent with a GPU may lack it
    from tests.prediction.stubs import random_bundle

    model = bundle.load(random_bundle(tmp_path / "model", embed_dim=16, depths=[1], num_heads=[1], decoder_channels=8))
    with pytest.raises(PredictionError, match="attention is 'flash'; expected one of auto, einsum, fused"):
        Forward(model, attention="flash")
    monkeypatch.setattr(choice, "why_not_here", lambda: "there is no card")
    with pytest.raises(ConfigError, match="attention is 'fused', but there is no card; expected auto or einsum"):
        Forward(model, attention="fused")
    monkeypatch.setattr(choice, "why_not_here", lambda: "")
    image = np.random.default_rng(0).integers(500, 3000, (1, 32, 32, 6)).astype(np.int16)
    found = {way: np.asarray(Forward(model, attention=way)(image, None)) for way in choice.CHOICES}
    np.testing.assert_array_equal(found["auto"], found["fused"])
    assert 0 < relative_error(found["fused"], found["einsum"]) < 1e-5
