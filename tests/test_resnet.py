"""CifarResNet computes what a torch.nn ResNet does at the same weights; the asset is the published one."""

import functools
import io
import tarfile

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file

from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation import Classifier, extract_features, load_classifier, load_reference
from vq4dit_jax.evaluation.networks.resnet import CifarResNet
from vq4dit_jax.files import asset


def torch_resnet(depth: int):
    """The network with batch norm and option-A shortcuts, in torch's modules; the same three outputs, in NHWC order."""
    torch = pytest.importorskip("torch", reason="the reference network is PyTorch's")
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.stride, self.pad = stride, (width - inputs) // 2

        def forward(self, x):
            h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
            return F.relu(h + shortcut)

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            inputs = 16
            for stage, width in enumerate((16, 32, 64), start=1):
                blocks = []
                for block in range((depth - 2) // 6):
                    blocks.append(Block(inputs, width, 2 if stage > 1 and block == 0 else 1))
                    inputs = width
                setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.linear = nn.Linear(64, 10)

        @torch.no_grad()
        def forward(self, images: np.ndarray):
            mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
            std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
            x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            pool = F.avg_pool2d(x, 8).flatten(1)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            return {"pool": pool.numpy(), "spatial": spatial.numpy(), "logits": self.linear(pool).numpy()}

    torch.manual_seed(depth)
    return ResNet().eval()


def save_like_its_trainer(path, module) -> None:
    import torch

    state = {f"module.{k}": v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "best_prec1": 10.0}, path)


def convert(path) -> dict:
    from convert.resnet_cifar import load_checkpoint

    return load_checkpoint(path)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def assert_same_outputs(params: dict, module, depth: int) -> None:
    images = random_images(4)
    ours = jax.jit(CifarResNet(depth).apply)({"params": params}, images)
    theirs = module(images)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == np.float32
        assert np.linalg.norm(ours[name] - expected) < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("depth", [8, 20])
def test_random_network_agrees_with_torch(tmp_path, depth):
    module = torch_resnet(depth)
    import torch

    for layer in module.modules():  # statistics that folding cannot get right by chance
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias)
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    save_like_its_trainer(tmp_path / "net.th", module)
    assert_same_outputs(convert(tmp_path / "net.th"), module, depth)


@pytest.mark.parametrize("name", ["resnet20-12fca82f", "resnet56-4bfd9763"])
def test_published_network_agrees_with_torch(shared, name):
    depth = int(name[6:8])
    module = torch_resnet(depth)
    import torch

    file = shared / f"data/resnet_cifar10/{name}.th"
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    missing, unexpected = module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()}, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    assert_same_outputs(convert(file), module, depth)


def test_asset_is_the_conversion_of_the_published_network(shared, tmp_path):
    pytest.importorskip("torch", reason="the published file is PyTorch's")
    from convert.resnet_cifar import main

    main([str(shared / "data/resnet_cifar10/resnet56-4bfd9763.th"), str(tmp_path / "out.safetensors")])
    assert (tmp_path / "out.safetensors").read_bytes() == asset("cifar10_resnet56.safetensors").read_bytes()


def test_asset_has_the_parameters_of_resnet56():
    wanted = jax.eval_shape(CifarResNet(56).init, jax.random.key(0), random_images(1))["params"]
    found = load_file(asset("cifar10_resnet56.safetensors"))
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in traverse_util.flatten_dict(wanted, sep="/").items()
    }
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in found.values())


@pytest.fixture(scope="module")
def cifar10(shared) -> tuple[np.ndarray, np.ndarray]:
    """The first 100 test images of each class (1000, 32, 32, 3), and their labels."""
    images, labels, classes = [], [], []
    with tarfile.open(shared / "data/cifar10/cifar10_jpg.tar.xz") as archive:
        for member in archive:  # test/<class>/<number>.jpg, in order, before the train images
            if not member.name.startswith("test/"):
                break
            _, label, file = member.name.split("/")
            if label not in classes:
                classes.append(label)
            if file < "0100.jpg":
                images.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read()))))
                labels.append(classes.index(label))
    assert len(images) == 1000 and classes == sorted(classes)
    return np.stack(images), np.array(labels)


def assert_accuracy(logits: np.ndarray, labels: np.ndarray, wanted: float) -> None:
    """Within three standard deviations of the accuracy on all 10,000 images, for a sample of this size."""
    accuracy = (logits.argmax(axis=1) == labels).mean()
    assert abs(accuracy - wanted) < 3 * np.sqrt(wanted * (1 - wanted) / len(labels))


def test_resnet56_knows_cifar10_and_gave_the_shipped_reference(cifar10):
    images, labels = cifar10
    outputs = extract_features(load_classifier("cifar10_resnet56"), images)
    assert_accuracy(outputs["logits"], labels, 0.832)
    # Reference features stand in the order of the files' paths: 1000 of each class.
    shipped = load_reference(asset("cifar10_reference.npz")).features.reshape(10, 1000, 64)[:, :100].reshape(1000, 64)
    np.testing.assert_allclose(shipped, outputs["pool"], rtol=2**-11, atol=1e-5)


def test_resnet20_knows_cifar10(shared, cifar10):
    pytest.importorskip("torch", reason="the checkpoint is PyTorch's")
    images, labels = cifar10
    params = convert(shared / "data/resnet_cifar10/resnet20-12fca82f.th")
    apply = functools.partial(jax.jit(CifarResNet(20).apply), {"params": params})
    logits = extract_features(Classifier("resnet20", apply, title="ResNet-20"), images)["logits"]
    assert_accuracy(logits, labels, 0.810)


@pytest.mark.parametrize("images", [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 32, 32, 3), np.float32)])
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(InputError, match=r"uint8 \(B, 32, 32, 3\)"):
        load_classifier("cifar10_resnet56").apply(images)


def test_impossible_depth_is_refused():
    with pytest.raises(InputError, match="depth=21"):
        jax.eval_shape(CifarResNet(21).init, jax.random.key(0), random_images(1))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("module.layer2.0.bn2.running_var"), "no parameter 'module.layer2.0.bn2.running_var'"),
        (lambda s: s.update({"module.extra.weight": s["module.bn1.weight"]}), "module.extra.weight is no parameter"),
        (lambda s: s.update({"module.linear.weight": s["module.bn1.weight"]}), r"linear.weight has shape \(16,\)"),
    ],
)
def test_converter_refuses_other_networks(tmp_path, capsys, change, message):
    module = torch_resnet(8)
    import torch

    from convert.resnet_cifar import main

    save_like_its_trainer(tmp_path / "net.th", module)
    checkpoint = torch.load(tmp_path / "net.th", weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "net.th")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "net.th")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "net.th"), str(tmp_path / "out.safetensors")])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not (tmp_path / "out.safetensors").exists()
