# SPDX-License-Identifier: Apache-2.0
"""Well-known models, made to look trained, for the long test and the benchmark of compaction."""

import pytest
import torch
from torch import nn

TORCHVISION = [
    *("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg16_bn", "mobilenet_v2"),
    *("mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet", "regnet_y_400mf"),
    *("convnext_tiny", "shufflenet_v2_x1_0", "squeezenet1_0", "alexnet", "mnasnet0_5"),
    *("vit_b_16", "swin_t"),
]
TIMM = [
    *("resnet18d", "deit_tiny_patch16_224", "mixer_s16_224", "res2net50_26w_4s"),
    *("edgenext_xx_small", "convnextv2_atto"),
]
ZOO = [*(("torchvision", name) for name in TORCHVISION), *(("timm", name) for name in TIMM)]


def build(library, name):
    """Return an untrained model with statistics and affines as after training."""
    torch.manual_seed(0)
    if library == "timm":
        return randomise(pytest.importorskip("timm").create_model(name))
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name == "googlenet" else {}
    return randomise(models.get_model(name, weights=None, **options))


def randomise(model):
    """Draw statistics and affines; layer scales, response norms and heads are not 0 either."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
        if type(module).__name__ == "GlobalResponseNorm":
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "layer_scale")):  # 1e-6 at first, which would hide the branch
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
