# SPDX-License-Identifier: Apache-2.0
"""Blocks of different sizes and a lambda between them: some are selected, others are not."""

import torch

from dessilbi.blocks.structure import expand
from dessilbi.optimizers import dual


@torch.no_grad()
def unlike(optimizer):
    """Scale the blocks of every structured tensor, later ones more, in place."""
    for member in dual.members(optimizer):
        count = member.spec.num_blocks
        factors = torch.linspace(0.4, 1.6, count).reshape(member.grid)
        member.param.mul_(expand(factors, member.block, member.param.shape))


def halve(optimizer):
    """Give every unit the lambda that half of its blocks exceed now, in place."""
    units = dual.units_of(dual.members(optimizer))
    for unit, norms in zip(units, dual.norms_of(optimizer, units), strict=True):
        middle = norms.reshape(-1).sort().values[norms.numel() // 2 - 1 : norms.numel() // 2 + 1]
        for member in unit:
            member.group["lam"] = float(middle.mean())
