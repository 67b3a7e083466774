# SPDX-License-Identifier: Apache-2.0
"""VGG-16 and VGG-19 with batch normalisation, as they are commonly used on CIFAR."""

from torch import Tensor, nn

# Simonyan and Zisserman (2015), table 1, columns D and E: convolutions of each stage.
VGG16 = (2, 2, 3, 3, 3)
VGG19 = (2, 2, 4, 4, 4)
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """3x3 convolutions with batch norm and ReLU in five pooled stages, one linear layer.

    The convolutions have no bias: the batch norm behind each would subtract it again. They start
    from He's normal distribution (``fan_out``), batch norms from the identity.

    Args:
        depths: Convolutions of each stage.
        num_classes: Width of the output.
        in_channels: 3; five poolings take 32x32 colour images to 1x1 and 28x28 ones to nothing.

    Raises:
        ValueError: ``in_channels`` is not 3.

    >>> import torch
    >>> VGG(VGG16)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, depths: tuple[int, ...], *, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if in_channels != 3:
            raise ValueError(
                f"VGG reads 32x32 images of 3 channels, not of {in_channels}: "
                f"choose another model for this data"
            )
        self.features = nn.Sequential()
        channels = in_channels
        for stage, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True), start=1):
            for index in range(1, depth + 1):
                conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
                self.initialise(conv)
                # The names of the paper (conv1_1 ... conv5_3) are what people look for in a report.
                self.features.add_module(f"conv{stage}_{index}", conv)
                self.features.add_module(f"norm{stage}_{index}", nn.BatchNorm2d(width))
                self.features.add_module(f"relu{stage}_{index}", nn.ReLU())
                channels = width
            self.features.add_module(f"pool{stage}", nn.MaxPool2d(2))
        self.fc = nn.Linear(channels, num_classes)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        """Draw the weights of a convolution; other layers keep what they drew themselves."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 3, 32, 32)."""
        logits: Tensor = self.fc(self.features(inputs).flatten(1))
        return logits
