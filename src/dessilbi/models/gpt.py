# SPDX-License-Identifier: Apache-2.0
"""A small transformer that tells the next character, after Radford et al. (2019), GPT-2."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone reads at once
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention of several heads.

    Query, key, value and output are linear layers of their own: the rows of the first three and
    the columns of the last belong to heads, one after the other.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, T, width): each place attends to itself and to those before it."""
        query, key, value = (
            layer(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        answer: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return answer


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a shortcut and behind a layer norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, T, width)."""
        y = inputs + self.attention(self.norm1(inputs))
        out: Tensor = y + self.down(F.gelu(self.up(self.norm2(y))))
        return out


class GPT(nn.Module):
    """Embeddings of characters and places, blocks, and a linear layer to the next character.

    No dropout and no shared weights: the output layer is one of its own. Matrices start from a
    normal distribution of deviation 0.02, those that write into the shortcut from
    0.02 / sqrt(2 * ``depth``), biases from 0.

    Args:
        num_classes: Different characters.
        length: Longest text it reads.
        width: Of the shortcut; a multiple of ``num_heads``.
        depth: Blocks.
        num_heads: Of each block.

    >>> GPT(num_classes=65, length=32)(torch.zeros(2, 32, dtype=torch.int64)).shape
    torch.Size([2, 32, 65])
    """

    def __init__(
        self,
        *,
        num_classes: int,
        length: int,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(num_classes, width)
        self.places = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, bias=False)
        nn.init.normal_(self.places, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_shortcut = name.endswith((".out", ".down"))
                nn.init.normal_(
                    module.weight, std=0.02 / (2 * depth if into_shortcut else 1) ** 0.5
                )
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, T, classes) of the character after each of (N, T)."""
        y = self.characters(inputs) + self.places[: inputs.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(y)))
        return logits
