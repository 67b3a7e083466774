# SPDX-License-Identifier: Apache-2.0
"""Thinning: tickets and weights made ready for training: combined, rescaled, cut out."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.compaction import compact
from dessilbi.training.data import Data
from dessilbi.training.starting import Start

THIN = 0.02  # a layer that keeps less of its weights starts too small to learn


def without(ticket: Ticket, names: Collection[str]) -> Ticket:
    """Return a ticket that says nothing of these tensors."""
    if not any(name in names for name in ticket):
        return ticket
    left = [name for name in ticket if name not in names]
    origin = {key: value for key, value in ticket.origin.items() if key != "closed"}
    return Ticket({n: ticket[n] for n in left}, {n: ticket.specs[n] for n in left}, origin)


def met(one: Ticket, other: Ticket) -> Ticket:
    """Return the ticket that keeps what both keep; what one does not name it keeps whole.

    >>> from torch import tensor
    >>> one = Ticket({"w": tensor([[True], [False]])}, {"w": TensorSpec((2, 3), (1, None))})
    >>> other = Ticket({"w": tensor([[True, False, True]])}, {"w": TensorSpec((2, 3), (2, 1))})
    >>> met(one, other).mask_of("w").int().tolist()
    [[1, 0, 1], [0, 0, 0]]
    """
    masks, specs = {**one, **other}, {**one.specs, **other.specs}
    for name in set(one) & set(other):
        if one.specs[name] == other.specs[name]:
            masks[name] = one[name] & other[name]
        else:
            shape = specs[name].shape
            specs[name] = TensorSpec(shape, (1,) * len(shape))
            masks[name] = one.mask_of(name) & other.mask_of(name)
    origin = {key: value for key, value in one.origin.items() if key != "closed"}
    return Ticket(masks, specs, origin)


def warn_if_thin(ticket: Ticket) -> None:
    """Warn where a layer keeps so little that it may not learn from its initialisation."""
    shares = {
        name: float(ticket.mask_of(name).double().mean())
        for name, spec in ticket.specs.items()
        if len(spec.shape) > 1 and 0 not in spec.shape
    }
    thin = {name: share for name, share in shares.items() if share < THIN}
    if thin:
        listed = ", ".join(f"{name} {100 * share:.2g} %" for name, share in thin.items())
        warnings.warn(
            f"layers that keep less than {100 * THIN:g} % of their weights may start too small to "
            f"learn: {listed}; --rescale divides the kept weights by the root of what is left",
            stacklevel=2,
        )


def rescaled(weights: Mapping[str, Tensor], ticket: Ticket) -> dict[str, Tensor]:
    """Return weights divided by the root of the density of their layer.

    Rows that are wholly dead do not count: the living ones then add up inputs as large as those of
    the dense layer. Biases and norms stay as they are.

    >>> import torch
    >>> spec = {"w": TensorSpec((2, 4), (1, 1))}
    >>> mask = torch.tensor([[True, False, False, False], [False] * 4])
    >>> rescaled({"w": torch.ones(2, 4)}, Ticket({"w": mask}, spec))["w"][0].tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    result = dict(weights)
    for name, spec in ticket.specs.items():
        if len(spec.shape) < 2:
            continue
        mask = ticket.mask_of(name).flatten(1)
        alive = mask[mask.any(dim=1)]
        if alive.numel():
            result[name] = result[name] / alive.double().mean().sqrt().to(result[name].dtype)
    return result


def cut_out(start: Start, model: nn.Module, data: Data) -> Start:
    """Return the start of the physically smaller model.

    Args:
        start: Of the masked model; its ticket is closed.
        model: The masked model, with its first weights.
        data: Of the run.

    Raises:
        ValueError: No exact compaction was found that can be trained.
    """
    if start.ticket is None:
        return start
    example = data.train.examples(1)[0]
    training = model.training
    small = compact(model, start.ticket, example_inputs=example)
    model.train(training)
    blueprint = small.blueprint
    if blueprint.form == "program":
        raise ValueError(
            f"{type(model).__name__} can only be compacted as an exported program, which cannot be "
            f"trained: retrain without --compact"
        )
    if start.blueprint is not None:
        blueprint = start.blueprint.then(blueprint)
    return replace(
        start,
        weights=dict(small.model.state_dict()),
        ticket=small.ticket,
        blueprint=blueprint,
    )
