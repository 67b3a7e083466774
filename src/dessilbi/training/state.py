# SPDX-License-Identifier: Apache-2.0
"""State: the tensors of a model and its optimizer under plain names, to be saved and put back.

"model/NAME" is a weight or buffer, "optimizer/NAME/KEY" what the optimizer keeps for a weight.
Sharded tensors stay sharded; what is put back may be whole or sharded, whatever it was before.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks.naming import canonical_names
from dessilbi.blocks.sharding import is_sharded, like, local, local_part
from dessilbi.files.storage import DamagedFileError

Tensors = dict[str, Tensor]


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """Return every tensor of a model and its optimizer; they are not copied."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    names = _names(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer/{names[index]}/{key}"] = torch.as_tensor(value)
    return tensors


def templates(model: nn.Module, optimizer: Optimizer, listed: Mapping[str, Any]) -> Tensors:
    """Return empty tensors to load into, placed as the model's are.

    Args:
        model: As it is placed now.
        optimizer: Of this model.
        listed: name -> (shape, dtype's name), of every tensor that was saved.
    """
    weights = dict(model.named_parameters())
    own = model.state_dict()
    empty = {}
    for name, (shape, dtype) in listed.items():
        kind, _, rest = name.partition("/")
        place = own.get(rest) if kind == "model" else weights.get(rest.rpartition("/")[0])
        if place is not None and list(place.shape) == list(shape):
            empty[name] = torch.empty_like(place, dtype=getattr(torch, dtype))
        else:
            empty[name] = torch.empty(shape, dtype=getattr(torch, dtype))
    return empty


@torch.no_grad()
def restore(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`tensors_of` returned, in place.

    Raises:
        DamagedFileError: A tensor is missing, or of another shape.
    """
    for name, own in model.state_dict().items():
        saved = tensors.get(f"model/{name}")
        if saved is None or saved.shape != own.shape:
            raise DamagedFileError(f"the checkpoint does not fit the model: look at {name}")
        _copy(saved, own)
    names = _names(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        owner, _, key = rest.rpartition("/")
        if kind == "optimizer":
            index = names.index(owner)
            state.setdefault(index, {})[key] = _placed(value, params[index])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def whole(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return plain, contiguous CPU tensors that share no memory; every process must call this."""
    result, seen = {}, set()
    for name, value in tensors.items():
        full = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
        full = full.detach().cpu().contiguous()
        if full.data_ptr() in seen:  # tied weights
            full = full.clone()
        seen.add(full.data_ptr())
        result[name] = full
    return result


def _names(optimizer: Optimizer) -> list[str]:
    """Canonical names of all parameters, in the order of the optimizer's state dict."""
    return canonical_names([n for group in optimizer.param_groups for n in group["param_names"]])


def _copy(saved: Tensor, own: Tensor) -> None:
    if is_sharded(saved) == is_sharded(own):
        local(own).copy_(local(saved))
    else:
        local(own).copy_(local_part(saved, own))


def _placed(saved: Tensor, param: Tensor) -> Tensor:
    """A copy of saved state in fresh memory, laid out and sharded as its parameter."""
    if saved.shape != param.shape:
        return saved.clone()
    part = torch.empty_like(local(param), dtype=saved.dtype)
    part.copy_(local(saved) if is_sharded(saved) else local_part(saved, param))
    return like(part, param)
