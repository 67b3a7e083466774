# SPDX-License-Identifier: Apache-2.0
"""Random closed tickets of well-known models compact exactly (long)."""

import copy

import pytest
import torch
from torch import nn

from dessilbi.compaction import compact
from dessilbi.testing import random_ticket

pytestmark = pytest.mark.full

TORCHVISION = [
    *("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg16_bn", "mobilenet_v2"),
    *("mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet", "regnet_y_400mf"),
    *("convnext_tiny", "shufflenet_v2_x1_0", "squeezenet1_0", "alexnet", "mnasnet0_5"),
    *("vit_b_16", "swin_t"),
]
TIMM = [
    *("resnet18d", "deit_tiny_patch16_224", "mixer_s16_224", "res2net50_26w_4s"),
    "edgenext_xx_small",
]


def build(library, name):
    torch.manual_seed(0)
    if library == "timm":
        return pytest.importorskip("timm").create_model(name)
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, **options)


def randomise(model):
    """Statistics and affines as after training, and no head of zeros."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


@pytest.mark.parametrize("density", [0.7, 0.4])
@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_zoo_model_compacts_exactly(library, name, density):
    model = randomise(build(library, name))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, x = model.to(dtype), torch.randn(1, 3, 224, 224, dtype=dtype)
        ticket = random_ticket(model, example_inputs=x, density=density)
        result = compact(model, ticket, example_inputs=x)
        masked = ticket.apply_(copy.deepcopy(model))
        y = torch.randn(2, 3, 224, 224, dtype=dtype)
        with torch.no_grad():
            expected, found = masked(y), result.model.eval()(y)
        assert (expected - found).abs().max() <= tolerance * expected.abs().max()
        assert result.proof.removed > 0
