"""The PyTorch rival against ours on shared random weights: outputs, gradients, a tiled map. Skipped without torch."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import common  # noqa: E402
from benchmarks.rival import model as torch_rival  # noqa: E402
from benchmarks.rival import tiled as torch_tiled  # noqa: E402

torch.set_num_threads(1)  # two pools in one process fight for the cores
TINY = {"embed_dim": 8, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 4, 8], "mlp_ratio": 2.0, "decoder_channels": 8}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(bundle opened, its checkpoint's path, its fields)."""
    from biomass_jax import bundle
    from biomass_jax.convert.export import export

    folder = tmp_path_factory.mktemp("rival")
    path = common.random_bundle(TINY | {"drop_path_rate": 0.0, "head_dropout": 0.0}, folder / "bundle")
    export(path, folder / "weights.ckpt")
    opened = bundle.load(path)
    return opened, folder / "weights.ckpt", opened.meta["architecture"]


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def ours_on(opened, images):
    import jax

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(opened.module().apply)(opened.variables, images))


@pytest.mark.parametrize("side", [(224, 224), (61, 58)])  # the masks that are kept; padding, odd maps, a resize
def test_outputs(shared, tmp_path, side):
    opened, checkpoint, fields = shared
    images = np.random.default_rng(0).standard_normal((2, *side, 6), np.float32)
    ours = ours_on(opened, images)
    np.savez(tmp_path / "shared.npz", images=images, ours=ours, fields=json.dumps(fields))
    found = torch_rival.check(checkpoint, tmp_path / "shared.npz")
    assert found["error"] < 5e-6 and found["std"] > 1e-3
    np.savez(tmp_path / "shared.npz", images=images, ours=ours * 1.001, fields=json.dumps(fields))
    with pytest.raises(SystemExit, match="differs from ours"):
        torch_rival.check(checkpoint, tmp_path / "shared.npz")


def test_a_training_step_has_our_loss_and_gradient(shared):
    import jax

    from biomass_jax.tasks.losses import finish, loss_sums

    opened, checkpoint, fields = shared
    rng = np.random.default_rng(1)
    images = rng.standard_normal((2, 64, 64, 6), np.float32)
    labels = np.where(rng.random((2, 64, 64)) < 0.1, rng.gamma(2, 50, (2, 64, 64)), -1).astype(np.float32)

    def loss_of(params):
        variables = {"params": params, "batch_stats": opened.variables["batch_stats"]}
        output, _ = opened.module().apply(variables, images, train=True, mutable=["batch_stats"])
        return finish(*loss_sums(output, labels, "rmse"), "rmse")

    with jax.default_matmul_precision("highest"):
        loss, gradient = jax.jit(jax.value_and_grad(loss_of))(opened.variables["params"])
    model = torch_rival.load(checkpoint, fields).train()
    theirs = torch_rival.rmse(model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())), torch.from_numpy(labels))
    theirs.backward()
    assert theirs.item() == pytest.approx(float(loss), rel=1e-5)
    block = gradient["encoder"]["stages_2"]["blocks_1"]
    other = model.get_submodule("encoder.stages_2.blocks.1")
    table = other.attn.w_msa.relative_position_bias_table.grad.numpy()
    assert relative(np.asarray(block["attn"]["relative_position_bias_table"]), table) < 2e-4
    assert relative(np.asarray(block["mlp"]["fc1"]["kernel"]), other.ffn.layers[0][0].weight.grad.numpy().T) < 2e-4
    before = other.norm1.weight.detach().clone()
    torch_rival.optimizer(model, "cpu").step()
    # Adam's first step is the rate, whatever the gradient; the decay comes on top.
    assert (other.norm1.weight - before).abs().max().item() == pytest.approx(3.14e-4, rel=0.1)


def test_a_tiled_map_is_ours_with_the_same_tiling(shared, tmp_path):
    import rasterio

    from benchmarks.predict import scene
    from biomass_jax.prediction.predictor import Predictor

    opened, checkpoint, fields = shared
    source = scene(440, tmp_path)
    result = Predictor(opened, tiling="reference_1_2").predict_file(source, tmp_path / "ours.tif")
    model = torch_rival.load(checkpoint, fields)

    def predict(images):
        with torch.inference_mode():
            return model(images)

    image = torch_tiled.normalised(torch.from_numpy(torch_tiled.read_image(source)))
    theirs = torch_tiled.tiled(predict, image).numpy()
    with rasterio.open(result.path) as ours:
        values = ours.read(1)
    known = values != -1  # the rival maps no-data too
    assert known.mean() > 0.8
    assert relative(values[known], theirs[known]) < 1e-5
    torch_tiled.map_file(predict, source, tmp_path / "theirs.tif")
    with rasterio.open(tmp_path / "theirs.tif") as written:
        assert np.abs(written.read(1) - theirs).max() <= 1


def test_the_data_loader_reads_what_was_written(tmp_path):
    from benchmarks.data_prep import make_chip, write_geotiffs
    from benchmarks.rival.work import pairs_of

    write_geotiffs(tmp_path, 3)
    torch.manual_seed(0)
    batches = list(torch_tiled.loader(pairs_of(tmp_path), batch_size=2, workers=0))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 6, 224, 224)]  # the partial batch is dropped
    written = [make_chip(i) for i in range(3)]
    for image, label in zip(*batches[0], strict=True):
        turned = [(image.numpy(), label.numpy()), (image.numpy()[..., ::-1], label.numpy()[..., ::-1])]
        assert any(
            np.array_equal(a, pixels[1:7]) and np.array_equal(b, known) for a, b in turned for pixels, known in written
        )
