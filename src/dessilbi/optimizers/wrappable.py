# SPDX-License-Identifier: Apache-2.0
"""Wrappable: which optimizers can be a base of wrap, said in one sentence where they cannot."""

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from dessilbi.optimizers import dual

OPTIONS = ("kappa", "nu", "lam", "structure", "unit", "block_scale")


def check_base(base: object, path_lr: float | None) -> None:
    """Refuse a base that :func:`dessilbi.wrap` cannot take.

    Raises:
        TypeError: It is no torch optimizer.
        ValueError: It is of a kind whose steps, lr or own options do not mean what wrap needs.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"wrap takes a torch optimizer but was given {type(base).__name__}: "
            f"build one first, for example torch.optim.AdamW(model.named_parameters())"
        )
    kind = type(base).__name__
    if isinstance(base, LBFGS):
        raise ValueError(
            "wrap was given LBFGS, which moves the weights several times in one step: "
            "use a base with one update per step, such as SGD or AdamW"
        )
    if callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None)):
        raise ValueError(
            f"wrap was given {kind}, whose train() and eval() swap the weights, so that p is not "
            f"the iterate: use a base without them, such as SGD or AdamW"
        )
    if taken := sorted(set(OPTIONS) & set(base.defaults)):
        raise ValueError(
            f"wrap was given {kind}, whose own option {taken[0]!r} means something else: use a "
            f"base without it, such as SGD or AdamW"
        )
    if any(dual.STATE_KEY in state for state in base.state.values()):
        raise ValueError(
            f"wrap was given {kind}, whose state holds {dual.STATE_KEY!r} already: wrap a new "
            f"base, and load the state of a wrapped optimizer into the wrapped one"
        )
    if path_lr is not None:
        if not 0 < path_lr < float("inf"):
            raise ValueError(f"path_lr={path_lr!r} is not allowed: it must be > 0 and finite")
        return
    for group in base.param_groups:
        adaptive = "d_coef" in group or group.get("relative_step") or kind == "Adafactor"
        if adaptive or not isinstance(group.get("lr"), float | int | Tensor):
            raise ValueError(
                f"wrap was given {kind}, whose lr is not the step of the weights: "
                f"say the step to use for the coupling with path_lr=..."
            )
