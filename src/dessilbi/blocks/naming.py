# SPDX-License-Identifier: Apache-2.0
"""Canonical parameter names: the ones the plain model has, whatever it is wrapped in."""

from collections.abc import Sequence

from torch import nn

_WRAPPER_PARTS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # compile, FSDP1, AC
)
_PREFIX = "module."


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside DistributedDataParallel, DataParallel or torch.compile.

    >>> model = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(model)) is model
    True
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def canonical_name(name: str) -> str:
    """Drop the parts that torch.compile, FSDP and checkpoint wrappers put into a name.

    >>> canonical_name("layer1._orig_mod.weight")
    'layer1.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def canonical_names(names: Sequence[str]) -> list[str]:
    """Canonical names of all parameters of one model, also those of a DDP wrapper.

    DDP prefixes every name with ``module.``; the prefix is dropped only when all names have it,
    because a plain model may well call one of its parts "module".

    >>> canonical_names(["module.fc.weight", "module.fc.bias"])
    ['fc.weight', 'fc.bias']
    """
    plain = [canonical_name(name) for name in names]
    if plain and all(name.startswith(_PREFIX) for name in plain):
        return [name.removeprefix(_PREFIX) for name in plain]
    return plain


def bias_name(weight: str) -> str:
    """Return the name a layer's bias has beside its weight.

    >>> bias_name("features.0.weight")
    'features.0.bias'
    """
    return weight.removesuffix("weight") + "bias"


def tensor_names(model: nn.Module) -> dict[str, str]:
    """Return own name -> canonical name for every parameter and buffer, shared ones included.

    >>> tensor_names(nn.Sequential(nn.BatchNorm1d(2, affine=False)))["0.running_mean"]
    '0.running_mean'
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    plain = canonical_names(parameters)
    is_prefixed = plain != [canonical_name(name) for name in parameters]
    others = [canonical_name(name) for name in buffers]
    if is_prefixed:
        others = [name.removeprefix(_PREFIX) for name in others]
    return dict(zip([*parameters, *buffers], [*plain, *others], strict=True))
