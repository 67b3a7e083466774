# SPDX-License-Identifier: Apache-2.0
"""Random nets go on after compaction as the big ones do under their ticket, or are refused."""

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from random_nets import any_ticket, nets

from dessilbi import DessiLBI
from dessilbi.blocks.naming import canonical_name
from dessilbi.compaction.compaction import compact
from dessilbi.cuts.closing import close_on, flagged, settle_on
from dessilbi.cuts.cutting import cut_tensor
from dessilbi.graph import read_graph

pytestmark = pytest.mark.full


def optimizer_of(model):
    """Norms over whole layers see every entry that should be dead and is not."""
    named = list(model.named_parameters())
    return DessiLBI(
        [
            {"params": [(n, p) for n, p in named if p.dim() > 1]}
            | {"structure": "layer", "block_scale": "sqrt", "lam": 1e-4},
            {"params": [(n, p) for n, p in named if p.dim() == 1]},
        ],
        lr=1e-3,
        nu=0.05,
        momentum=0.5,
        weight_decay=0.5,
    )


def advance(model, optimizer, k):
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


def is_rescaled(graph, axis):
    return axis.name in graph.reading.rescaled


def outcome(model, density, seed, *, whole):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = copy.deepcopy(model).double().train()
    graph = read_graph(model, x)
    ticket = close_on(graph, any_ticket(graph, density, seed, "whole" if whole else "any"))
    gone = settle_on(graph, ticket).gone
    if any((flagged(graph.axes[c.axis], gone) & c.columns).any() for c in graph.constants):
        return "folds a constant"  # the columns that read it are gone: not the same dynamics
    if any(
        flagged(graph.axes[axis], gone).any() for axis in graph.axes if is_rescaled(graph, axis)
    ):
        return "rescales a norm"  # a weight of another size takes steps of another size
    optimizer = optimizer_of(model)
    for k in range(2):
        advance(model, optimizer, k)
    try:
        small = compact(model, ticket, example_inputs=x, optimizer=optimizer)
    except ValueError as error:
        return str(error)
    ticket.enforce(model, optimizer)
    for k in range(2, 10):
        advance(model, optimizer, k)
        advance(small.model, small.optimizer, k)
    for name, param in small.model.named_parameters():
        cuts = small.cuts.get(canonical_name(name), ())
        whole_param = cut_tensor(model.get_parameter(name).detach(), cuts)
        torch.testing.assert_close(param.detach(), whole_param, rtol=1e-9, atol=1e-10)
    return "equal" if np.any(gone) else "nothing"


def test_many_random_nets_train_on_as_their_big_ones():
    seen = []

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking a net takes longer than it tells
    )
    @given(nets(), st.sampled_from([0.7, 0.4]), st.integers(0, 99), st.booleans())
    def check(model, density, seed, whole):
        seen.append(outcome(model, density, seed, whole=whole))

    check()
    told = {
        kind: seen.count(kind)
        for kind in ("equal", "nothing", "folds a constant", "rescales a norm")
    }
    print(f"{len(seen)} nets: {told}")
    assert told["equal"] >= len(seen) // 3
