# SPDX-License-Identifier: Apache-2.0
"""Random closed tickets of well-known models compact exactly (long)."""

import copy

import pytest
import torch
from zoo import ZOO, build

from dessilbi.compaction.compaction import compact
from dessilbi.testing import random_ticket

pytestmark = pytest.mark.full


@pytest.mark.parametrize("density", [0.7, 0.4])
@pytest.mark.parametrize(("library", "name"), ZOO)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_zoo_model_compacts_exactly(library, name, density):
    model = build(library, name)
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
