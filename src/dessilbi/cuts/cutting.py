# SPDX-License-Identifier: Apache-2.0
"""Cutting: which indices of every tensor stay, and the same cut for Python modules.

The cuts are a plain value: optimizer state, saved files and the two ways of compaction use them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import tensor_names
from dessilbi.blocks.structure import Block, expand, extent, indices
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.closing import Flags, flagged
from dessilbi.graph import Graph
from dessilbi.graph.foreign import is_conv1d
from dessilbi.graph.labels import Ids


@dataclass(frozen=True)
class Cut:
    """Indices of one dimension that stay, in order.

    With ``groups`` > 1 they count the input channels of a grouped convolution over all groups.
    """

    name: str
    dim: int
    size: int
    index: Ids
    groups: int = 1


Cuts = Mapping[str, tuple[Cut, ...]]


def find_cuts(graph: Graph, gone: Flags) -> dict[str, tuple[Cut, ...]]:
    """Return tensor -> its cuts, for tensors that get smaller."""
    found: dict[tuple[str, int], Cut] = {}
    for axis, blocks in graph.axes.items():
        stays = ~flagged(blocks, gone)
        if not stays.all():
            index = np.flatnonzero(stays)
            cut = Cut(axis.name, axis.dim, axis.size, index, axis.groups)
            found[axis.name, axis.dim] = cut
    names = sorted({name for name, _ in found})
    return {
        name: tuple(cut for (n, _), cut in sorted(found.items()) if n == name) for name in names
    }


def groups_after(cuts: tuple[Cut, ...], groups: int) -> int:
    """Return how many groups of a grouped convolution stay."""
    for cut in sorted(cuts, key=lambda cut: -cut.groups):
        if cut.groups > 1 or cut.dim == 0:
            return len(np.unique(cut.index // (cut.size // groups)))
    return groups


def cut_tensor(tensor: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
    """Return the part of ``tensor`` that stays.

    >>> cut_tensor(torch.arange(6).reshape(2, 3), (Cut("w", 1, 3, np.array([0, 2])),))
    tensor([[0, 2],
            [3, 5]])
    """
    grouped = next((cut for cut in cuts if cut.groups > 1), None)
    if grouped is not None:
        rows = next((cut.index for cut in cuts if cut.dim == 0), np.arange(tensor.shape[0]))
        return _cut_grouped(tensor, rows, grouped)
    for cut in cuts:
        tensor = tensor.index_select(cut.dim, torch.from_numpy(cut.index).to(tensor.device))
    return tensor.clone()


def _cut_grouped(tensor: Tensor, rows: Ids, columns: Cut) -> Tensor:
    """Every group of rows reads its own columns, the same number everywhere."""
    width = columns.size // columns.groups
    height = tensor.shape[0] // columns.groups
    parts = []
    for group in np.unique(columns.index // width).tolist():
        mine = torch.from_numpy(rows[rows // height == group])
        inside = torch.from_numpy(columns.index[columns.index // width == group] - group * width)
        device = tensor.device
        parts.append(tensor[mine.to(device)].index_select(1, inside.to(device)))
    return torch.cat(parts)


def cut_ticket(ticket: Ticket, cuts: Cuts) -> Ticket:
    """Return what a ticket says of the tensors after the cut: what is dead and still there.

    >>> spec = TensorSpec(shape=(2, 3), block=(1, None))
    >>> ticket = Ticket({"w": torch.tensor([[True], [False]])}, {"w": spec})
    >>> cut_ticket(ticket, {"w": (Cut("w", 1, 3, np.array([0, 2])),)}).specs["w"]
    TensorSpec(shape=(2, 2), block=(1, None))
    """
    masks, specs = dict(ticket), dict(ticket.specs)
    for name in ticket:
        if name in cuts:
            whole = cut_tensor(ticket.mask_of(name), cuts[name])
            specs[name], masks[name] = _as_blocks(whole, specs[name].block)
    return Ticket(masks, specs, {"compacted": True, "of": ticket.digest()})


def _as_blocks(mask: Tensor, block: Block) -> tuple[TensorSpec, Tensor]:
    """Return an element-wise mask by blocks, finer ones where the cut went through them."""
    shape = tuple(mask.shape)
    for lengths in (block, tuple(n and 1 for n in block), (1,) * len(block)):
        if any(size % extent(n, size) for n, size in zip(lengths, shape, strict=True)):
            continue
        values = mask
        for dim, (n, size) in enumerate(zip(lengths, shape, strict=True)):
            values = values.index_select(dim, indices(n, size)[:, 0])
        if torch.equal(expand(values, lengths, shape), mask):
            break
    return TensorSpec(shape, lengths), values


def cut_module(model: nn.Module, cuts: Cuts, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of ``model`` with cut parameters, buffers and layer sizes.

    Args:
        model: The model; it is not changed, and tensors that stay whole are shared.
        cuts: What stays of every tensor.
        tensors: Values by name, before the cut; biases the model does not have are added.
    """
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    canonical = tensor_names(model)
    names = {id(t): canonical[n] for n, t in reversed(named)}
    model = copy.deepcopy(model, {id(t): t for _, t in named})
    done = {name: cut_tensor(t, cuts[name]) for name, t in tensors.items() if name in cuts}
    fresh = {name: done.get(name, t) for name, t in tensors.items()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        touched: dict[str, tuple[Cut, ...]] = {}
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                name = names.get(id(tensor))
                if tensor is None or name is None or name not in fresh:
                    continue
                if name in cuts:
                    touched[key] = cuts[name]
                own[key] = fresh[name]  # type: ignore[assignment]
                if isinstance(tensor, nn.Parameter):
                    parameter = nn.Parameter(fresh[name], requires_grad=tensor.requires_grad)
                    own[key] = made.setdefault(id(tensor), parameter)
        if touched:
            _resize(module, touched)
    for name in fresh.keys() - names.values():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = module._parameters.get("weight")
        trained = weight is None or weight.requires_grad
        setattr(module, key, nn.Parameter(fresh[name], requires_grad=trained))
    return model


def _resize(module: nn.Module, touched: dict[str, tuple[Cut, ...]]) -> None:
    """Tell a layer its new sizes."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        before = module.groups
        if "weight" in touched:
            module.groups = groups_after(touched["weight"], before)
        rows, columns = (shape[1], shape[0]) if module.transposed else (shape[0], shape[1])
        if module.transposed:
            module.in_channels, module.out_channels = columns, rows * module.groups
        else:
            module.out_channels, module.in_channels = rows, columns * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif is_conv1d(module):
        module.nx, module.nf = shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * shape[0] // module.num_channels
        module.num_channels = shape[0]
    elif isinstance(module, nn.RMSNorm):
        if module.eps is None:  # the type's own; compact writes it out before it changes the type
            module.eps = torch.finfo(weight.dtype).eps
        module.eps *= touched["weight"][0].size / shape[0]
        module.normalized_shape = shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
