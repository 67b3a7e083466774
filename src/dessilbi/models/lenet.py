# SPDX-License-Identifier: Apache-2.0
"""LeNet-5 as the authors of DessiLBI trained it on MNIST."""

import torch.nn.functional as F  # noqa: N812 - the name everyone reads at once
from torch import Tensor, nn


class LeNet(nn.Module):
    """Three 5x5 convolutions (6, 16 and 120 filters) and two linear layers (84, classes).

    The first convolution pads by 2, so that 28x28 images give the sizes of the 32x32 ones of
    LeCun et al. and the third convolution's output is 1x1. ReLU and max pooling stand where the
    original had tanh and averages. Initialisation is PyTorch's default.

    Args:
        num_classes: Width of the output.
        in_channels: 1; the sizes fit 28x28 grey images only.

    Raises:
        ValueError: ``in_channels`` is not 1.

    >>> import torch
    >>> LeNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        if in_channels != 1:
            raise ValueError(
                f"lenet reads 28x28 images of 1 channel, not of {in_channels}: "
                f"choose another model for this data"
            )
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.conv3 = nn.Conv2d(16, 120, kernel_size=5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 1, 28, 28)."""
        y = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        y = F.max_pool2d(F.relu(self.conv2(y)), 2)
        y = F.relu(self.conv3(y)).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(y)))
        return logits
