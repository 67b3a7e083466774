# SPDX-License-Identifier: Apache-2.0
"""Small models in which tensors hang together, for the tests of coupling and planning."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class Residual(nn.Module):
    """Filters meet in two sums; the inside of each block is free."""

    def __init__(self, width=8, inner=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, inner, 3, padding=1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual: expand, depthwise, project."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.expand, self.norm = nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 4, 1)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.norm(self.expand(x))))))
        return self.head(x)


class Transformer(nn.Module):
    """One layer on image patches, with q, k and v apart; a classifier on the mean token."""

    def __init__(self, heads=3, size=4, width=8, hidden=10):
        super().__init__()
        self.heads, self.size = heads, size
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.proj = nn.Linear(heads * size, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.fc1, self.fc2 = nn.Linear(width, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(b, n, self.heads, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(y.reshape(b, n, self.heads * self.size))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.fc2(F.relu(self.fc1(x.mean(1))))


class Concat(nn.Module):
    """A residual sum that starts within a concatenation: only a part of ``c`` belongs to it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 1)
        self.c, self.d = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.d(F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


class Conditioned(nn.Module):
    """A linear layer of one vector per sample whose neurons meet filters in a sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.vector, self.out = nn.Conv2d(3, 5, 1), nn.Linear(2, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x, t):
        return self.out(F.relu(self.conv(x) + self.vector(t)[:, :, None, None]))


class Tied(nn.Module):
    """One convolution in two places, and a linear layer tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 6, 1)
        self.twice = nn.Conv1d(6, 6, 3, padding=1)
        self.tokens = nn.Embedding(9, 4)
        self.back, self.head = nn.Conv1d(6, 4, 1), nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.first(self.tokens(ids).transpose(1, 2))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(F.layer_norm(self.back(x).transpose(1, 2), (4,)))


def lenet():
    """Two convolutions and a classifier of two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, groups=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(5 * 16, 6), nn.ReLU(), nn.Linear(6, 2)),
    )


def grouped():
    """A convolution of two groups between two others."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU()),
        nn.Conv2d(6, 2, 1),
    )
