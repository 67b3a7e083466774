# SPDX-License-Identifier: Apache-2.0
"""timm: ``create_optimizer_v2(model, "dessilbi")``, and ``--opt dessilbi`` of its train script.

Importing this module registers the name. timm hands an optimizer bare parameters, so blocks are
chosen by shape; give ``param_group_fn`` to have them by module, and coupled. As a program it runs
another one with the name registered::

    python -m dessilbi.integrations.timm train.py DIR --model resnet18 --opt dessilbi \
        --opt-kwargs nu=50 lam=2.0
"""

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from dessilbi.blocks.structure import Structure
from dessilbi.integrations.recording import name_parameters
from dessilbi.optimizers.optimizer import DessiLBI

try:
    from timm.optim._optim_factory import OptimInfo, default_registry
except ImportError as error:
    raise ImportError(
        f"timm's registry needs timm ({error}): pip install 'dessilbi[vision]'"
    ) from error

__all__ = ["name_parameters", "structured_by_shape"]

NAME = "dessilbi"


def structured_by_shape(params: Iterable[Any], **options: Any) -> DessiLBI:
    """Return DessiLBI on timm's groups: filters for convolutions, elements for matrices.

    Tensors of one dimension, and those with one row only (class tokens, positions), have no
    structure. Groups that say their structure keep it.

    Args:
        params: Parameters or groups of them, as timm makes them.
        options: Those of :class:`dessilbi.DessiLBI`. ``structure`` is for all that has one.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4, 2))
    >>> optimizer = structured_by_shape(model.parameters(), lam=0.1)
    >>> [(g["structure"], len(g["params"])) for g in optimizer.param_groups]
    [('filter', 1), (None, 2), ('element', 1)]
    """
    wanted = options.pop("structure", None)
    groups: list[dict[str, Any]] = []
    for given in params:
        group = given if isinstance(given, dict) else {"params": [given]}
        if "structure" in group:
            groups.append(group)
            continue
        parts: dict[Structure | None, list[Tensor]] = {}
        for param in group["params"]:
            structure = _by_shape(param)
            parts.setdefault(structure and (wanted or structure), []).append(param)
        groups += [{**group, "params": own, "structure": s} for s, own in parts.items()]
    return DessiLBI(_merged(groups), **options)


def _by_shape(param: Tensor) -> str | None:
    if param.dim() < 2 or param.shape[0] == 1:
        return None
    return "element" if param.dim() == 2 else "filter"


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the same options as one, in their order."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        key = repr(sorted((k, v) for k, v in group.items() if k != "params"))
        found.setdefault(key, {**group, "params": []})["params"] += list(group["params"])
    return list(found.values())


default_registry.register(
    OptimInfo(
        name=NAME,
        opt_class=structured_by_shape,
        description="Split linearised Bregman iteration: a family of sparse models in one run",
        has_eps=False,
        has_momentum=True,
    )
)


def main() -> None:
    """Run a script of timm, with the arguments behind its name."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        named = f"there is no file {sys.argv[1]}" if len(sys.argv) > 1 else "no script was named"
        sys.exit(f"{named}: give timm's train.py and its arguments")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
