# SPDX-License-Identifier: Apache-2.0
"""The models that recipes name: their sizes, their initialisation, what they refuse."""

import math
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi.models import IMAGE_MODELS, MODELS, build_model
from dessilbi.models.gpt import GPT
from dessilbi.models.resnet import BasicBlock, Bottleneck, ResNet

# 2 (a + b): weight and bias of batch norms. By hand, layer by layer, for 10 classes.
LENET = (25 + 1) * 6 + (150 + 1) * 16 + (400 + 1) * 120 + 121 * 84 + 85 * 10
STEM = 27 * 16 + 2 * 16


def basic(n):
    """He et al.'s 6n + 2 net with projections."""
    first = n * (2 * 9 * 16**2 + 4 * 16)
    second = n * (2 * 9 * 32**2 + 4 * 32) - 9 * 32 * 16 + (16 * 32 + 2 * 32)
    third = n * (2 * 9 * 64**2 + 4 * 64) - 9 * 64 * 32 + (32 * 64 + 2 * 64)
    return STEM + first + second + third + 65 * 10


def bottleneck_block(c, w):
    return c * w + 9 * w * w + w * 4 * w + 2 * (w + w + 4 * w)


BOTTLENECK = (
    STEM
    + (bottleneck_block(16, 16) + 8 * bottleneck_block(64, 16) + 16 * 64 + 2 * 64)
    + (bottleneck_block(64, 32) + 8 * bottleneck_block(128, 32) + 64 * 128 + 2 * 128)
    + (bottleneck_block(128, 64) + 8 * bottleneck_block(256, 64) + 128 * 256 + 2 * 256)
    + 257 * 10
)
VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG19_WIDTHS = (64, 64, 128, 128, *(256,) * 4, *(512,) * 8)


def vgg(widths):
    convs = sum(9 * a * b for a, b in zip((3, *widths), widths, strict=False))
    return convs + 2 * sum(widths) + 513 * 10


def wide_stage(c, w):
    """Two basic blocks; where the width changes, a projection."""
    first = 9 * c * w + 9 * w * w + 4 * w + (c * w + 2 * w if c != w else 0)
    return first + 18 * w * w + 4 * w


RESNET18 = (
    (27 * 64 + 2 * 64)
    + (wide_stage(64, 64) + wide_stage(64, 128) + wide_stage(128, 256) + wide_stage(256, 512))
    + 513 * 10
)
# Four linear layers with biases, two of the perceptron, two norms; embeddings, norm and output.
GPT_BLOCK = 4 * (128 + 1) * 128 + (128 + 1) * 512 + (512 + 1) * 128 + 2 * 2 * 128
GPT_10 = 10 * 128 + 16 * 128 + 4 * GPT_BLOCK + 2 * 128 + 128 * 10
PARAMETERS = {
    "lenet": LENET,
    "resnet8": basic(1),
    "resnet8-small": basic(1),  # the same on a quarter of the pixels
    "resnet20": basic(3),
    "resnet32": basic(5),
    "resnet50": basic(8),
    "resnet56": basic(9),
    "resnet56-bottleneck": BOTTLENECK,
    "resnet18": RESNET18,
    "vgg16-bn": vgg(VGG_WIDTHS),
    "vgg19-bn": vgg(VGG19_WIDTHS),
    "gpt": GPT_10,
}


def channels_of(name):
    return 1 if name == "lenet" else 3


def build(name, seed=0):
    sizes = {"length": 16} if name == "gpt" else {"in_channels": channels_of(name)}
    return build_model(name, num_classes=10, seed=seed, **sizes)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_figures_by_hand_are_the_known_ones():
    assert (LENET, basic(1), basic(3)) == (61_706, 78_042, 272_474)
    assert (BOTTLENECK, vgg(VGG_WIDTHS), RESNET18) == (869_530, 14_724_042, 11_173_962)
    assert set(PARAMETERS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_parameters_counted_by_hand(name):
    assert num_parameters(build(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_model_gives_one_row_of_logits_per_image_and_every_parameter_a_gradient(name):
    model = build(name)
    side = {"lenet": 28, "vgg16-bn": 32, "vgg19-bn": 32}.get(name, 16)
    images = torch.randn(4, channels_of(name), side, side, generator=torch.Generator())

    logits = model(images)
    logits.square().sum().backward()

    assert logits.shape == (4, 10)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_text_model_answers_every_character_from_those_before_it():
    model = build("gpt").eval()
    codes = torch.randint(10, (3, 16), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 10

    logits, other = model(codes), model(changed)
    logits.square().sum().backward()

    assert logits.shape == (3, 16, 10)
    assert_close(logits[:, :9], other[:, :9])
    differs = (logits != other).any(-1)
    assert differs[:, 9:].all()
    assert_close(model(codes[:, :5]), logits[:, :5])  # shorter texts are read too
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_the_text_model_starts_without_an_opinion():
    model = GPT(num_classes=65, length=16, depth=2)
    logits = model(torch.arange(16)[None])
    assert logits.log_softmax(-1).mean().item() == pytest.approx(-math.log(65), abs=0.1)
    assert model.blocks[0].down.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.blocks[0].up.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_residual_nets_read_grey_images_of_28_pixels(name):
    model = build_model(name, num_classes=7, in_channels=1, seed=0).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_lenet_has_the_names_and_shapes_of_the_paper():
    shapes = {name: tuple(weight.shape) for name, weight in build("lenet").named_parameters()}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        "conv1.weight": (6, 1, 5, 5),
        "conv2.weight": (16, 6, 5, 5),
        "conv3.weight": (120, 16, 5, 5),
        "fc1.weight": (84, 120),
        "fc2.weight": (10, 84),
    }


@pytest.mark.parametrize(
    ("name", "in_a_row", "projections"),
    [("resnet20", 19, 2), ("resnet56", 55, 2), ("resnet56-bottleneck", 82, 3)],
)
def test_a_residual_net_has_the_depth_it_states(name, in_a_row, projections):
    convs = [n for n, m in build(name).named_modules() if isinstance(m, nn.Conv2d)]
    beside = [n for n in convs if "shortcut" in n]
    assert (len(convs) - len(beside), len(beside)) == (in_a_row, projections)


def test_vgg_names_its_convolutions_like_the_paper_and_gives_them_no_bias():
    convs = {n: m for n, m in build("vgg16-bn").named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 13
    assert list(convs)[-1] == "features.conv5_3"
    assert all(conv.bias is None for conv in convs.values())


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_padded_shortcuts_have_no_parameters(block):
    padded = ResNet(block, 1, shortcut="pad")
    projected = ResNet(block, 1, shortcut="projection")

    beside = [n for n, _ in padded.named_parameters() if "shortcut" in n]
    of_projections = sum(p.numel() for n, p in projected.named_parameters() if "shortcut" in n)

    assert beside == []
    assert of_projections > 0
    assert num_parameters(padded) == num_parameters(projected) - of_projections
    assert padded(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_padded_shortcut_passes_its_input_and_adds_zero_channels():
    block = BasicBlock(16, 32, stride=2, shortcut="pad").eval()
    nn.init.zeros_(block.conv2.weight)
    images = torch.rand(2, 16, 8, 8, generator=torch.Generator())

    out = block(images)

    assert_close(out[:, :16], images[:, :, ::2, ::2], rtol=0, atol=0)
    assert_close(out[:, 16:], torch.zeros(2, 16, 4, 4), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet8", "vgg16-bn"])
def test_convolutions_start_from_he_normal_by_fan_out(name):
    convs = [m for m in build(name).modules() if isinstance(m, nn.Conv2d)]
    assert convs
    for conv in convs:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        measured = conv.weight.std() * (fan_out / 2) ** 0.5
        # Five standard errors of a deviation estimated from numel samples.
        assert abs(measured - 1) < 5 / (2 * conv.weight.numel()) ** 0.5


@pytest.mark.parametrize("name", ["lenet", "resnet8", "resnet56-bottleneck"])
def test_the_initialisation_depends_on_the_seed_alone(name):
    torch.manual_seed(1)
    first = build(name, seed=3).state_dict()
    torch.manual_seed(2)
    torch.rand(5)
    second = build(name, seed=3).state_dict()
    other = build(name, seed=4).state_dict()

    for key, value in first.items():
        assert torch.equal(value, second[key])
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_a_seeded_build_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build("lenet", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unseeded_build_draws_from_the_global_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build("lenet", seed=None)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(build("lenet", seed=None).conv1.weight, first.conv1.weight)


def test_a_seeded_build_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        model = build("lenet", seed=3)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(model.fc1.weight, build("lenet", seed=3).fc1.weight)


@pytest.mark.parametrize(
    ("build_one", "inputs"),
    [
        (partial(build, "lenet"), torch.randn(2, 1, 28, 28, generator=torch.Generator())),
        (partial(build, "resnet8"), torch.randn(2, 3, 32, 32, generator=torch.Generator())),
        (
            partial(ResNet, Bottleneck, 1, shortcut="pad"),
            torch.randn(2, 3, 32, 32, generator=torch.Generator()),
        ),
        (partial(build, "vgg16-bn"), torch.randn(2, 3, 32, 32, generator=torch.Generator())),
        (partial(GPT, num_classes=10, length=16, depth=1), torch.arange(20).reshape(2, 10) % 10),
    ],
    ids=["lenet", "resnet8", "bottleneck-pad", "vgg16-bn", "gpt"],
)
def test_an_exported_model_computes_the_same_for_any_number_of_samples(build_one, inputs):
    model = build_one().eval()
    shapes = ({0: torch.export.Dim("samples", max=64)},)
    program = torch.export.export(model, (inputs,), dynamic_shapes=shapes)
    more = torch.cat([inputs, inputs.flip(0), inputs.flip(1)])
    expected = model(more)
    assert expected.std() > 0
    assert_close(program.module()(more), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet21", 10, 3), r"model='resnet21' is not known: use one of lenet, .*mean resnet"),
        (("timm:", 10, 3), r"model='timm:' is not known"),
        (("lenet", 10, 3), r"lenet reads 28x28 images of 1 channel, not of 3"),
        (("vgg16-bn", 10, 1), r"VGG reads 32x32 images of 3 channels, not of 1"),
        (("resnet20", 10, 0), r"a ResNet reads images of 1 or more channels, not of 0"),
        (("lenet", 1, 1), r"a model for 1 classes has nothing to decide: give 2 or more"),
        (("resnet20", 10, None), r"model resnet20 reads images, and the data are text"),
        (("timm:resnet18", 10, None), r"model timm:resnet18 reads images, and the data are text"),
        (("gpt", 10, 3), r"model gpt reads text, and the data are images"),
        (("torchvision:resnet18", 10, 1), r"torchvision:resnet18 reads images of 3 channels"),
        (("torchvision:alexnett", 10, 3), r"no model 'alexnett': did you mean alexnet"),
        (("torchvision:fcn_resnet50", 10, 3), r"torchvision has no model 'fcn_resnet50'"),
        (("timm:convnext_tin", 10, 3), r"timm has no model 'convnext_tin': .* convnext_tiny, "),
        (("timm:hf-hub:timm/resnet18", 10, 3), r"timm has no model 'hf-hub:timm/resnet18'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    name, num_classes, in_channels = arguments
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=num_classes, in_channels=in_channels)


@pytest.mark.parametrize(
    ("name", "in_channels", "side"),
    [
        ("torchvision:mobilenet_v3_small", 3, 32),
        ("torchvision:googlenet", 3, 64),
        ("timm:resnet10t", 1, 32),
        ("timm:vit_tiny_patch16_224", 3, 32),
    ],
)
def test_models_of_libraries_are_built_from_the_seed_for_the_data(name, in_channels, side):
    sizes = {"num_classes": 7, "in_channels": in_channels, "side": side}
    before = torch.get_rng_state()
    model, again, other = (build_model(name, seed=seed, **sizes) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights, same, others = (list(m.parameters()) for m in (model, again, other))
    assert all(map(torch.equal, weights, same))
    assert not all(map(torch.equal, weights, others))
    assert model.training
    assert model(torch.zeros(2, in_channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_missing_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}:resnet18 needs .*\[vision\]'"):
        build_model(f"{library}:resnet18", num_classes=10, in_channels=3)


def test_a_resnet_refuses_no_blocks_and_unknown_shortcuts():
    with pytest.raises(ValueError, match="a ResNet of 0 blocks per stage is not one"):
        ResNet(BasicBlock, 0)
    with pytest.raises(ValueError, match="shortcut 'A' is unknown: use 'projection' or 'pad'"):
        ResNet(BasicBlock, 1, shortcut="A")
