"""The FID network computes what PyTorch's does at the same weights, whatever file they come from."""

import io
import pathlib
import sys
import tarfile
import zipfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convert import inception as convert_inception
from vq4dit_jax import evaluation
from vq4dit_jax.errors import InputError, MissingExtraError
from vq4dit_jax.evaluation import classifiers
from vq4dit_jax.evaluation.networks.inception import Inception, resize

_FOLDED = "data/inception/inception_2015_12_05_bnfolded_to_mixed_8.npz"


def _layers() -> list[str]:
    """Names of the convolutions in TensorFlow's graph, in the order in which torchvision's module has them."""
    tower = lambda name, count: [f"{name}/conv", *(f"{name}/conv_{i}" for i in range(1, count))]
    names = tower("", 5)
    for block in ("mixed", "mixed_1", "mixed_2"):
        names += [f"{block}/conv", *tower(f"{block}/tower", 2), *tower(f"{block}/tower_1", 3), f"{block}/tower_2/conv"]
    names += ["mixed_3/conv", *tower("mixed_3/tower", 3)]
    for block in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
        names += [f"{block}/conv", *tower(f"{block}/tower", 3), *tower(f"{block}/tower_1", 5), f"{block}/tower_2/conv"]
    names += [*tower("mixed_8/tower", 2), *tower("mixed_8/tower_1", 4)]
    for block in ("mixed_9", "mixed_10"):
        names += [f"{block}/conv", f"{block}/tower/conv", *tower(f"{block}/tower/mixed", 2)]
        names += [*tower(f"{block}/tower_1", 2), *tower(f"{block}/tower_1/mixed", 2), f"{block}/tower_2/conv"]
    return [name.removeprefix("/") for name in names]


LAYERS = _layers()


@pytest.fixture(scope="module")
def graph_constants() -> dict[str, np.ndarray]:
    """Random weights, batch norm and all, by the names of TensorFlow's graph."""
    random = np.random.default_rng(0)
    shapes = {convert_inception.graph_name(k): v for k, v in convert_inception.expected_shapes(True).items()}
    assert set(shapes) == {*LAYERS, "softmax"}
    out = {}
    for name in LAYERS:
        kernel, width = shapes[name]["kernel"], shapes[name]["bias"]
        scale = np.sqrt(2 / np.prod(kernel[:-1]))
        out[f"{name}/conv2d_params"] = scale * random.standard_normal(kernel, np.float32)
        out[f"{name}/batchnorm/gamma"] = random.uniform(0.5, 1.5, width)
        out[f"{name}/batchnorm/beta"] = random.normal(0, 0.1, width)
        out[f"{name}/batchnorm/moving_mean"] = random.normal(0, 0.1, width)
        out[f"{name}/batchnorm/moving_variance"] = random.uniform(0.5, 1.5, width)
    out["softmax/weights"] = random.normal(0, 0.05, shapes["softmax"]["kernel"])
    out["softmax/biases"] = random.normal(0, 0.1, shapes["softmax"]["bias"])
    return {name: value.astype(np.float32) for name, value in out.items()}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the reference network is PyTorch's")


@pytest.fixture(scope="module")
def tensorflow():
    return pytest.importorskip("tensorflow", reason="the reference is TensorFlow's")


@pytest.fixture(scope="module")
def torch_state(torch, graph_constants) -> dict:
    """The same weights by torchvision's names. The names are those of the modules of the reference network."""
    from benchmarks.torch_inception import Conv, TorchInception

    modules = [name for name, module in TorchInception().named_modules() if isinstance(module, Conv)]
    state = {}
    for layer, module in zip(LAYERS, modules, strict=True):
        state[f"{module}.conv.weight"] = graph_constants[f"{layer}/conv2d_params"].transpose(3, 2, 0, 1)
        for part, name in dict(
            gamma="weight", beta="bias", moving_mean="running_mean", moving_variance="running_var"
        ).items():
            state[f"{module}.bn.{name}"] = graph_constants[f"{layer}/batchnorm/{part}"]
    state["fc.weight"], state["fc.bias"] = graph_constants["softmax/weights"].T, graph_constants["softmax/biases"]
    return {name: torch.from_numpy(value.copy()) for name, value in state.items()}


@pytest.fixture(scope="module")
def folded(graph_constants) -> dict[str, np.ndarray]:
    """The same weights as a folded `.npz` has them, folded in float64 by (x - mean) / sqrt(variance + eps) as it stands."""
    out = {}
    for name in LAYERS:
        gamma, beta, mean, variance = (
            graph_constants[f"{name}/batchnorm/{part}"].astype(np.float64)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        deviation = np.sqrt(variance + 0.001)
        key = name.replace("/", "_")
        out[f"{key}/kernel_hwio"] = (graph_constants[f"{name}/conv2d_params"] * (gamma / deviation)).astype(np.float32)
        out[f"{key}/bias"] = (beta - gamma * mean / deviation).astype(np.float32)
    return out | {
        "softmax/kernel": graph_constants["softmax/weights"],
        "softmax/bias": graph_constants["softmax/biases"],
    }


@pytest.fixture(scope="module")
def weights_file(folded, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("weights") / "complete.npz"
    np.savez(path, **folded)
    return path


@pytest.fixture(scope="module")
def folded_file(shared) -> pathlib.Path:
    path = shared / _FOLDED
    if not path.is_file():
        pytest.skip(f"needs ../shared/{_FOLDED}")
    return path


@pytest.fixture(scope="module")
def published(folded_file) -> evaluation.Classifier:
    return evaluation.load_inception(folded_file)


def resize_in_float64(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize of one image, pixel by pixel from its definition."""
    height, width, _ = image.shape
    out = np.zeros((size, size, 3))
    for y in range(size):
        for x in range(size):
            top, left = y * height / size, x * width / size
            y0, x0 = int(top), int(left)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            fy, fx = top - y0, left - x0
            upper = (1 - fx) * image[y0, x0] + fx * image[y0, x1]
            out[y, x] = (1 - fy) * upper + fy * ((1 - fx) * image[y1, x0] + fx * image[y1, x1])
    return out


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest over images."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


def torch_features(torch, network, images: np.ndarray) -> dict[str, np.ndarray]:
    """Of images resized with numpy, not with what is tested."""
    x = np.stack([resize_in_float64(image.astype(np.float64), 299) for image in images])
    with torch.no_grad():
        outputs = network.eval()(torch.from_numpy(((x - 128) / 128).transpose(0, 3, 1, 2).astype(np.float32)))
    return {name: value.numpy() for name, value in outputs.items()}


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)


def cifar_images(shared, count: int) -> np.ndarray:
    images = []
    with tarfile.open(shared / "data/cifar10/cifar10_jpg.tar.xz") as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                images.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")))
            if len(images) == count:
                return np.stack(images)
    raise AssertionError(f"the archive has {len(images)} images only")


@hypothesis.settings(max_examples=15)
@hypothesis.given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 40))
def test_resize_is_bilinear_from_the_corner(height, width, size):
    images = random_images(1, height, width)
    ours = np.asarray(resize(jnp.asarray(images, jnp.float32), size))
    # At a whole number float32 may round the position to the pixel before: the value is the same to rounding.
    np.testing.assert_allclose(ours[0], resize_in_float64(images[0].astype(np.float64), size), atol=2e-3)


@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (64, 37), (256, 256), (299, 299), (400, 301)])
def test_resize_is_tensorflow_1s(tensorflow, shape):
    images = random_images(1, *shape).astype(np.float32)
    theirs = tensorflow.compat.v1.image.resize_bilinear(images, (299, 299), align_corners=False).numpy()
    np.testing.assert_allclose(np.asarray(resize(jnp.asarray(images))), theirs, atol=1e-4)


def test_resize_of_a_full_size_image_changes_nothing():
    images = random_images(1, 299, 299)
    np.testing.assert_array_equal(np.asarray(resize(jnp.asarray(images, jnp.float32))), images)


def test_the_published_weights_agree_with_torch_on_photographs(shared, torch, folded_file, published):
    from benchmarks.inception_speed import torch_network

    images = cifar_images(shared, 3)
    ours = published(images)
    theirs = torch_features(torch, torch_network(folded_file, folded=False), images)
    assert {name: value.shape for name, value in ours.items()} == {"mixed_7": (3, 768), "spatial": (3, 2023)}
    assert relative_error(ours["mixed_7"], theirs["mixed_7"]) < 1e-5
    assert relative_error(ours["spatial"], theirs["spatial"]) < 1e-5


def test_complete_weights_agree_with_torch(torch, torch_state, weights_file):
    from benchmarks.torch_inception import TorchInception

    network = TorchInception()
    missing = network.load_state_dict(torch_state, strict=False)
    assert not missing.unexpected_keys and all("num_batches" in key for key in missing.missing_keys)
    images = random_images(2, 40, 30)
    classifier = evaluation.load_inception(weights_file)
    ours, theirs = evaluation.extract_features(classifier, images, 2), torch_features(torch, network, images)
    assert classifier.features == "pool_3"
    assert {name: value.shape[1] for name, value in ours.items()} == {
        "mixed_7": 768, "spatial": 2023, "pool_3": 2048, "logits": 1008,
    }  # fmt: skip
    for name, value in theirs.items():
        assert relative_error(ours[name], value) < 1e-5, name


def test_batches_do_not_change_an_image_s_features(published):
    images = random_images(published.batch_size + 3, 32, 32)
    whole = published(images)
    parts = list(classifiers.iterate_features(published, [images[3:5], images[5:5], images[5:]]))
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values[3:])


def frozen_graph(constants: dict[str, np.ndarray], path: pathlib.Path, prefix: str = "", **norm) -> pathlib.Path:
    """A GraphDef with the constants, and the batch-norm nodes of 2015."""
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    for name, value in constants.items():
        node = graph.node.add(op="Const", name=prefix + name)
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    graph.node.add(op="Const", name=prefix + "pool_3/_reshape/shape").attr["value"].tensor.CopyFrom(
        tf.make_tensor_proto(np.array([1, 2048], np.int32))
    )
    for name in LAYERS:
        node = graph.node.add(op="BatchNormWithGlobalNormalization", name=f"{prefix}{name}/batchnorm")
        node.attr["variance_epsilon"].f = norm.get("variance_epsilon", 0.001)
        node.attr["scale_after_normalization"].b = norm.get("scale_after_normalization", True)
    path.write_bytes(graph.SerializeToString())
    return path


def saved_model(tf, constants: dict[str, np.ndarray], folder: pathlib.Path, kind: str) -> pathlib.Path:
    """A SavedModel with the weights as variables, or as constants of a function."""
    module = tf.Module()
    if kind == "variables":
        module.weights = [tf.Variable(value, name=name) for name, value in constants.items()]
        tf.saved_model.save(module, str(folder))
        return folder

    @tf.function(input_signature=[])
    def first():
        graph = tf.compat.v1.GraphDef()
        for name, value in constants.items():
            node = graph.node.add(op="Const", name=name)
            node.attr["dtype"].type = tf.float32.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        return tf.graph_util.import_graph_def(graph, return_elements=[f"{next(iter(constants))}:0"], name="inception")

    module.first = first
    tf.saved_model.save(module, str(folder))
    return folder


def up_to_mixed_7(folded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in folded.items() if not k.startswith(("mixed_8", "mixed_9", "mixed_10", "softmax"))}


def assert_same_parameters(params: dict, folded: dict[str, np.ndarray]):
    found = {
        "_".join(str(k.key) for k in path[:-1]) + f"/{path[-1].key}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    expected = {name.replace("kernel_hwio", "kernel"): value for name, value in folded.items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("form", ["npz", "pth", "pb", "prefixed pb", "constants", "variables"])
def test_every_form_of_file_gives_the_same_parameters(form, request, graph_constants, folded, weights_file, tmp_path):
    if form == "npz":
        source = weights_file
    elif form == "pth":
        torch = request.getfixturevalue("torch")
        torch.save(request.getfixturevalue("torch_state"), source := tmp_path / "weights.pth")
    elif form.endswith("pb"):
        request.getfixturevalue("tensorflow")
        prefix = "FID_Inception_Net/" if form == "prefixed pb" else ""
        source = frozen_graph(graph_constants, tmp_path / "graph.pb", prefix)
    else:
        source = saved_model(request.getfixturevalue("tensorflow"), graph_constants, tmp_path / "module", form)
    params = convert_inception.load_inception(source)
    assert convert_inception.is_complete(params)
    assert_same_parameters(params, folded)


def test_a_graphs_own_batch_norm_constants_are_believed(tensorflow, graph_constants, tmp_path):
    path = frozen_graph(graph_constants, tmp_path / "g.pb", variance_epsilon=0.25, scale_after_normalization=False)
    layer = convert_inception.load_inception(path)["mixed_10"]["tower_1_mixed_conv_1"]
    name = "mixed_10/tower_1/mixed/conv_1"
    deviation = np.sqrt(graph_constants[f"{name}/batchnorm/moving_variance"] + np.float32(0.25))
    np.testing.assert_allclose(layer["kernel"], graph_constants[f"{name}/conv2d_params"] / deviation, rtol=1e-5)
    beta, mean = (graph_constants[f"{name}/batchnorm/{part}"] for part in ("beta", "moving_mean"))
    np.testing.assert_allclose(layer["bias"], beta - mean / deviation, rtol=1e-4, atol=1e-6)


def test_weights_up_to_mixed_7_give_no_more_than_that(folded, tmp_path):
    partial = {k: v for k, v in folded.items() if not k.startswith(("mixed_9", "mixed_10", "softmax"))}
    np.savez(tmp_path / "partial.npz", **partial)
    classifier = evaluation.load_classifier(f"inception:{tmp_path / 'partial.npz'}")
    assert classifier.features == "mixed_7" and "mixed_7" in classifier.name
    assert not convert_inception.is_complete(convert_inception.load_inception(tmp_path / "partial.npz"))


def test_the_checksum_is_that_of_the_weights_and_not_of_the_file(folded, tmp_path):
    weights = up_to_mixed_7(folded)
    np.savez(tmp_path / "a.npz", **weights)
    np.savez(tmp_path / "b.npz", **dict(reversed(weights.items())))
    np.savez(tmp_path / "c.npz", **weights | {"conv/bias": np.nextafter(weights["conv/bias"], np.float32(9))})
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "b.npz").read_bytes()
    a, b, c = (evaluation.load_inception(tmp_path / f"{name}.npz").checksum for name in "abc")
    assert a == b != c and len(a) == 64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("mixed_2_conv/bias"), "no parameter 'mixed_2_conv/bias'"),
        (lambda w: w.update({"conv/kernel_hwio": np.zeros((3, 3, 3, 31), np.float32)}), r"\(3, 3, 3, 31\).*\(3, 3, 3, 32\)"),
        (lambda w: w.update({"conv_1/bias": np.full(32, np.nan, np.float32)}), "conv_1/bias has values that are not finite"),
        (lambda w: w.update({"AuxLogits/bias": np.zeros(3, np.float32)}), "'AuxLogits/bias' is no parameter"),
        (lambda w: w.update({"conv_1/bias": np.array(["x"] * 32)}), "conv_1/bias is of type"),
    ],
)  # fmt: skip
def test_a_folded_file_with_wrong_parameters_is_named(change, message, folded, tmp_path):
    weights = up_to_mixed_7(folded)
    change(weights)
    path = tmp_path / "bad.npz"
    np.savez(path, **weights)
    with pytest.raises(InputError, match=f"bad.npz.*{message}"):
        convert_inception.load_inception(path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("Mixed_7c.branch_pool.bn.running_var", None, "no parameter 'Mixed_7c.branch_pool.bn.running_var'"),
        ("Mixed_7c.branch_pool.bn.running_var", -1.0, "mixed_10/tower_2/conv is not finite with batch norm folded"),
        ("fc.bias", np.inf, "fc.bias has values that are not finite"),
        ("AuxLogits.fc.weight", 0.0, "'AuxLogits.fc.weight' is no parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt:RuntimeWarning")
def test_a_torch_file_with_wrong_parameters_is_named(name, value, message, torch, torch_state, tmp_path):
    state = dict(torch_state)
    if value is None:
        del state[name]
    else:
        state[name] = torch.full_like(state.get(name, torch.zeros(2)), value)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=f"bad.pth.*{message}"):
        convert_inception.load_inception(tmp_path / "bad.pth")


def test_graphs_that_are_not_the_network_are_refused(tensorflow, tmp_path):
    (tmp_path / "bad.pb").write_bytes(b"\xff\xff\xff no protocol buffer")
    with pytest.raises(InputError, match="bad.pb.*not readable as a frozen TensorFlow graph"):
        convert_inception.load_inception(tmp_path / "bad.pb")
    (tmp_path / "empty.pb").write_bytes(b"")
    with pytest.raises(InputError, match="empty.pb.*no parameter"):
        convert_inception.load_inception(tmp_path / "empty.pb")
    with pytest.raises(InputError, match="no saved_model.pb"):
        convert_inception.load_inception(tmp_path)
    module = tensorflow.Module()
    module.weight = tensorflow.Variable(1.0, name="weight")
    tensorflow.saved_model.save(module, str(tmp_path / "other"))
    with pytest.raises(InputError, match="other.*have the layers of the Inception network.*pytorch-fid"):
        convert_inception.load_inception(tmp_path / "other")


@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:UserWarning")  # in tensorflow_hub
def test_a_module_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_hub", reason="handles are resolved by tensorflow_hub")
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="https://tfhub.dev/tensorflow/tfgan/eval/inception/1: cannot be fetched"):
        convert_inception.load_inception("https://tfhub.dev/tensorflow/tfgan/eval/inception/1")


def test_files_are_read_without_running_anything(tmp_path, torch):
    path = tmp_path / "pickled.npz"
    np.savez(path, **{"conv/bias": np.array([print], dtype=object)})
    with pytest.raises(InputError, match="pickled.npz.*pickled Python objects"):
        convert_inception.load_inception(path)
    torch.save({"conv": pathlib.PurePosixPath("x")}, tmp_path / "pickled.pth")
    with pytest.raises(InputError, match="pickled.pth.*refused"):
        convert_inception.load_inception(tmp_path / "pickled.pth")


def test_broken_and_missing_files_are_named(tmp_path, weights_file):
    with pytest.raises(InputError, match="nothing.npz: no such file"):
        convert_inception.load_inception(tmp_path / "nothing.npz")
    (tmp_path / "short.npz").write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(InputError, match="short.npz: not readable as .npz"):
        convert_inception.load_inception(tmp_path / "short.npz")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(InputError, match="empty.npz: no parameter"):
        convert_inception.load_inception(tmp_path / "empty.npz")


def test_without_tensorflow_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "graph.pb").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"graph.pb needs .*tensorflow.*vq4dit-jax\[tfgan\]"):
        convert_inception.load_inception(tmp_path / "graph.pb")


@pytest.mark.parametrize("images", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 4), np.uint8)])
def test_other_images_are_refused(images):
    params = jax.eval_shape(Inception(False).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8))
    with pytest.raises(InputError, match="Inception reads uint8"):
        jax.eval_shape(Inception(False).apply, params, images)


def test_a_classifier_is_found_by_its_name_or_its_path(weights_file):
    assert evaluation.load_classifier(str(weights_file)).features == "pool_3"
    assert evaluation.load_classifier(str(weights_file)) is evaluation.load_classifier(str(weights_file))
    with pytest.raises(InputError, match="classifier='vgg'.*cifar10_resnet56, inception:FILE"):
        evaluation.load_classifier("vgg")


@hypothesis.settings(max_examples=30)
@hypothesis.given(lengths=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 5))
def test_a_stream_is_cut_into_equal_batches(lengths, size):
    images = np.arange(sum(lengths) * 3, dtype=np.uint8).reshape(-1, 1, 1, 3)
    shapes = []

    def apply(batch):
        shapes.append(batch.shape)
        return {"pool": batch[:, 0, 0, :].astype(np.float32)}

    batches = np.split(images, np.cumsum(lengths)[:-1]) if lengths else []
    outputs = list(classifiers.iterate_features(evaluation.Classifier("net", apply, "Net"), batches, size))
    assert set(shapes) <= {(size, 1, 1, 3)} and len(shapes) == -(-len(images) // size)
    found = np.concatenate([out["pool"] for out in outputs]) if outputs else np.zeros((0, 3))
    np.testing.assert_array_equal(found, images.reshape(-1, 3))


def test_a_stream_of_several_sizes_is_refused():
    classifier = evaluation.Classifier("net", lambda batch: {"pool": batch[:, 0, 0]}, "Net")
    with pytest.raises(InputError, match="resize them alike"):
        list(classifiers.iterate_features(classifier, [random_images(1, 2, 2), random_images(1, 3, 2)], 4))
