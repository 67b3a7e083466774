# SPDX-License-Identifier: Apache-2.0
"""DessiLBI: train a network once, hold the whole family of its sparse models.

The public names below are loaded on first use, so that `import dessilbi` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dessilbi.blocks.ticket import Ticket as Ticket
    from dessilbi.compaction.compaction import Compacted as Compacted
    from dessilbi.compaction.compaction import close as close
    from dessilbi.compaction.compaction import compact as compact
    from dessilbi.dynamics.calibration import DensityControl as DensityControl
    from dessilbi.dynamics.clock import set_coupling as set_coupling
    from dessilbi.dynamics.clock import total_time as total_time
    from dessilbi.dynamics.scheduling import Schedules as Schedules
    from dessilbi.dynamics.scheduling import piecewise as piecewise
    from dessilbi.exporting import export as export
    from dessilbi.groups import param_groups as param_groups
    from dessilbi.growth.growth import Grown as Grown
    from dessilbi.growth.growth import grow as grow
    from dessilbi.maximising import maximise as maximise
    from dessilbi.optimizers.optimizer import DessiLBI as DessiLBI
    from dessilbi.optimizers.wrapping import wrap as wrap
    from dessilbi.path.path import Path as Path
    from dessilbi.planning import Plan as Plan
    from dessilbi.planning import plan as plan
    from dessilbi.saving.saving import load_compact as load_compact
    from dessilbi.saving.saving import save_compact as save_compact

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "Compacted": "dessilbi.compaction.compaction",
    "DensityControl": "dessilbi.dynamics.calibration",
    "DessiLBI": "dessilbi.optimizers.optimizer",
    "Grown": "dessilbi.growth.growth",
    "Path": "dessilbi.path.path",
    "Plan": "dessilbi.planning",
    "Schedules": "dessilbi.dynamics.scheduling",
    "Ticket": "dessilbi.blocks.ticket",
    "close": "dessilbi.compaction.compaction",
    "compact": "dessilbi.compaction.compaction",
    "export": "dessilbi.exporting",
    "grow": "dessilbi.growth.growth",
    "load_compact": "dessilbi.saving.saving",
    "maximise": "dessilbi.maximising",
    "param_groups": "dessilbi.groups",
    "piecewise": "dessilbi.dynamics.scheduling",
    "plan": "dessilbi.planning",
    "save_compact": "dessilbi.saving.saving",
    "set_coupling": "dessilbi.dynamics.clock",
    "total_time": "dessilbi.dynamics.clock",
    "wrap": "dessilbi.optimizers.wrapping",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dessilbi' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
