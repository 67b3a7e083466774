# SPDX-License-Identifier: Apache-2.0
"""A lambda for tests that want some blocks selected and others not."""

from dessilbi import dual


def halve(optimizer):
    """Give every unit the lambda that half of its blocks exceed now, in place."""
    units = dual.units_of(dual.members(optimizer))
    for unit, norms in zip(units, dual.norms_of(optimizer, units), strict=True):
        middle = norms.reshape(-1).sort().values[norms.numel() // 2 - 1 : norms.numel() // 2 + 1]
        for member in unit:
            member.group["lam"] = float(middle.mean())
