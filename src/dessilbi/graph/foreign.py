# SPDX-License-Identifier: Apache-2.0
"""Foreign: layers of other libraries, known by their names so that nothing has to be imported."""

from typing import Any, TypeGuard

from torch import nn


def is_conv1d(module: nn.Module) -> TypeGuard[Any]:
    """Return whether it is the linear layer of GPT-2, whose weight has its inputs first.

    >>> is_conv1d(nn.Conv1d(1, 1, 1))
    False
    """
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
