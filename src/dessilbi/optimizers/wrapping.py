# SPDX-License-Identifier: Apache-2.0
"""wrap: the dynamics of DessiLBI around another torch optimizer, which moves W as it always does.

The base takes its step; the coupling then joins the update once, outside the base's moments, and V
stays first order. W + kappa V moves by exactly the base's displacement.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks.sharding import local
from dessilbi.blocks.structure import Structure
from dessilbi.blocks.ticket import Ticket
from dessilbi.kernels import couple_
from dessilbi.kernels.pieces import Options
from dessilbi.optimizers import dual, fusing
from dessilbi.optimizers.carrying import Fusion
from dessilbi.optimizers.loading import laid_out, own_loaded_state, with_own_options
from dessilbi.optimizers.optimizer import DessiLBI, is_phantom_step
from dessilbi.optimizers.options import check_coupling, check_structure
from dessilbi.optimizers.wrappable import OPTIONS, check_base

_WRAPPED: WeakSet[Optimizer] = WeakSet()


def wrap(
    base: Optimizer,
    *,
    nu: float,
    lam: float,
    kappa: float = 1.0,
    structure: Structure | None = None,
    unit: str | None = None,
    block_scale: str = "unit",
    path_lr: float | None = None,
    fused: bool | None = None,
) -> "Wrapped":
    """Give ``base`` the dynamics of DessiLBI: V and Gamma beside the weights it trains.

    With lr the base's learning rate, alpha = lr/kappa, and r = (W - Gamma)/nu from the old pair:

        base.step();   then for parameters that had a gradient:  W <- W - lr r,   V <- V + alpha r

    so wrap(SGD(lr=kappa alpha)) is DessiLBI(lr=alpha, kappa=kappa). For SGD with momentum mu the
    base moves W about 1/(1 - mu) times as far as lr says, for Adam about lr per step whatever the
    gradient's size: choose nu by R = T/nu with T the sum of lr over the run (R of about 10). With
    AdamW at lr 1e-3 over 10,000 steps T is 10: nu = 1 and lam = 1 select something, while nu = 100
    never does.

    Args:
        base: Any torch optimizer that takes p as the iterate and lr as the step (SGD, Adam, AdamW,
            Muon, Lion, timm's). Its groups may carry structure, unit, lam, nu, kappa, block_scale.
        nu: The coupling's strength is 1/nu.
        lam: Threshold of ||V||, > 0; ``inf`` keeps Gamma at zero.
        kappa: Scale between V and Gamma; redundant, see DessiLBI.
        structure: Block shape for groups that do not carry their own; None leaves them to the base.
        unit: Unit of groups that do not carry their own.
        block_scale: "unit" or "sqrt", see DessiLBI.
        path_lr: The step of W to use for the coupling in place of the base's lr, for a base whose
            lr does not mean one (Prodigy, Adafactor).
        fused: Add the coupling in one pass over memory, as in DessiLBI: True builds that kernel if
            it is not there, None uses it where it is built, False never does.

    Returns:
        An optimizer to use in the base's place: hand it to schedulers, Path and GradScaler.
        ``param_groups`` is the base's own list. A step needs one buffer of the size of the
        structured weights beside V: the weights before the base moved them (kept from step to step
        if fused), or r.

    Raises:
        ValueError: An option is out of range, or the base is of a kind that cannot be wrapped, or
            keeps something of its own under a name of ours.
        TypeError: ``base`` is not a torch optimizer.

    >>> layer = torch.nn.Linear(8, 4)
    >>> base = torch.optim.AdamW(layer.named_parameters(), lr=1e-2)
    >>> optimizer = wrap(base, nu=0.1, lam=0.01, structure="layer")
    >>> layer(torch.ones(2, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[layer.weight])
    ['exp_avg', 'exp_avg_sq', 'step', 'v']
    """
    _check_new(base)
    check_base(base, path_lr)
    options = dict(zip(OPTIONS, (kappa, nu, lam, structure, unit, block_scale), strict=True))
    return Wrapped(base, options, path_lr, fused)


def _check_new(base: object) -> None:
    kind = type(base).__name__
    if isinstance(base, Optimizer) and base in _WRAPPED:
        raise ValueError(
            f"wrap was given a {kind} that is wrapped already: use the first wrapper, or build a "
            f"new base"
        )
    if isinstance(base, DessiLBI | Wrapped):
        raise ValueError(f"wrap was given a {kind}, which has a V already: use it as it is")


class Wrapped(Optimizer):
    """What :func:`wrap` returns; build it with that.

    Args:
        base: The wrapped optimizer; ``param_groups`` and ``state`` are its own.
        options: Defaults of the coupling for groups that do not carry their own.
        path_lr: See :func:`wrap`.
        fused: See :func:`wrap`.
    """

    def __init__(
        self,
        base: Optimizer,
        options: dict[str, Any],
        path_lr: float | None,
        fused: bool | None = None,
    ):
        # Not Optimizer.__init__, which would make groups and state of its own.
        super().__setstate__({"defaults": base.defaults, "base": base, "path_lr": path_lr})
        self.base: Optimizer
        self.path_lr: float | None
        self._options = options
        self._waiting: dict[Tensor, Tensor] = {}
        self._fused, self._fusion = fused, _fusion(fused)
        self._olds: dict[Tensor, Tensor] = {}
        self._owned: fusing.Choice | None = None  # for which every V is known to be ours
        self._refused: list[Tensor] = []  # have a V that is the base's
        before = [dict(group) for group in base.param_groups]
        try:
            for group in base.param_groups:
                self._complete(group)
            dual.units_of(dual.members(self))
        except Exception:
            for group, old in zip(base.param_groups, before, strict=True):
                group.clear()
                group.update(old)
            raise
        _WRAPPED.add(base)
        if fused:
            fusing.prepare(member.param for member in dual.members(self))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's own list of groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's own state, with "v" added."""
        return self.base.state

    def _complete(self, group: dict[str, Any]) -> None:
        """Fill in and check the coupling's options of one of the base's groups."""
        for name in OPTIONS:
            group.setdefault(name, self._options[name])
        check_coupling(group)
        check_structure(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it may carry the coupling's options.

        Raises:
            ValueError: An option is out of range or does not fit; the optimizer is unchanged.
        """
        self.base.add_param_group(param_group)
        try:
            self._complete(self.base.param_groups[-1])
            dual.units_of(dual.members(self))
        except Exception:
            self.base.param_groups.pop()
            raise
        if self._fused and self.base.param_groups[-1]["structure"] is not None:
            fusing.prepare(self.base.param_groups[-1]["params"])

    def alpha_of(self, group: dict[str, Any]) -> float | Tensor:
        """Return alpha = lr/kappa, the step of path time."""
        step: float | Tensor = group["lr"] if self.path_lr is None else self.path_lr
        alpha: float | Tensor = step / group["kappa"]
        return alpha

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take the base's step, then couple the weights it moved to Gamma.

        Args:
            closure: As the base takes it.

        Returns:
            What the base returns.

        Raises:
            ValueError: Members of a unit no longer agree.
        """
        phantom = closure is None and is_phantom_step(self)
        for group in self.param_groups:
            if OPTIONS[0] not in group:  # added to the base itself
                self._complete(group)
        choice = self._fusion.settled(self)
        # With a closure, gradients (and so who moves) are known only afterwards.
        fused = [p for p in choice.levels if closure is not None or p.grad is not None]
        rest = [m for unit in choice.units for m in unit if phantom or m.param not in choice.levels]
        moving = [m for m in rest if closure is not None or m.param.grad is not None]
        shrinks = dual.shrinks_of(self, rest)
        pulls = {m.param: self._pull(m, shrinks[m.param]) for m in moving if not phantom}
        alphas = [self.alpha_of(group) for group in self.param_groups]
        alphas = [a.clone() if isinstance(a, Tensor) else a for a in alphas]
        if not phantom:
            self._remember(fused)
        new = () if self._owned is choice else self._without_v(choice)
        self._check_own(self._refused)
        loss = self.base.step() if closure is None else self.base.step(closure)
        self._check_own(new)
        self._owned = None if new else choice
        self._couple(moving, pulls, alphas, phantom=phantom)
        if fused and not phantom:
            told = [_options(g, a) for g, a in zip(self.param_groups, alphas, strict=True)]
            if self._fusion.ready(self, told, self._olds):
                self._fusion.run()
        return loss

    def _without_v(self, choice: fusing.Choice) -> list[Tensor]:
        """Structured parameters that have no V yet."""
        found = [member.param for unit in choice.units for member in unit]
        return [p for p in found if dual.STATE_KEY not in self.state.get(p, ())]

    def _check_own(self, params: Iterable[Tensor]) -> None:
        """Refuse a base that keeps something of its own under the name of V."""
        self._refused = [p for p in params if dual.STATE_KEY in self.state.get(p, ())]
        if self._refused:
            raise ValueError(
                f"the state of {type(self.base).__name__} has a {dual.STATE_KEY!r} of its own, "
                f"which wrap would overwrite: use a base without it, such as SGD or AdamW"
            )

    def _remember(self, params: list[Tensor]) -> None:
        """Keep W as it is before the base moves it."""
        self._olds = {p: self._olds.get(p, p) for p in params}
        for p, old in self._olds.items():
            if old is p or not fusing.lies_as(old, p, p.dtype):  # a moved model lies elsewhere
                self._olds[p] = torch.empty_like(p)
        if params:
            torch._foreach_copy_(list(self._olds.values()), params)

    def _couple(
        self,
        moving: list[dual.Member],
        pulls: dict[Tensor, Tensor],
        alphas: list[float | Tensor],
        *,
        phantom: bool,
    ) -> None:
        """Add the coupling to what is not fused."""
        clock = {id(g): a for g, a in zip(self.param_groups, alphas, strict=True)}
        for member in moving:
            if member.param.grad is None:
                continue
            v = self._v_of(member.param)
            if not phantom:
                couple_(
                    local(member.param),
                    local(v),
                    pulls[member.param],
                    clock[id(member.group)],
                    kappa=member.group["kappa"],
                )

    def _buffer_of(self, param: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """Momentum is the base's own affair."""
        return None, False

    @property
    def kernel(self) -> str:
        """What the next coupling runs on: "fused-cpu", "reference", or both with "+"."""
        choice = self._fusion.choice(self)
        found = [member.param for unit in choice.units for member in unit]
        names = {choice.kernels[p].name if p in choice.kernels else "reference" for p in found}
        return "+".join(sorted(names))

    def _pull(self, member: dual.Member, shrink: dual.Shrink) -> Tensor:
        """Return r = (W - Gamma)/nu of the old pair, this rank's part."""
        nu = member.group["nu"]
        w = local(member.param).to(dual.dual_dtype(member.param))
        v = dual.v_of(self, member.param)
        if v is None:
            return w.div(nu)
        return (w - dual.gamma_on_rank(v, shrink, member)).div_(nu)

    def _v_of(self, param: Tensor) -> Tensor:
        """V of a parameter; joins the state only now, when the base's keys are there."""
        state = self.state[param]
        if dual.STATE_KEY not in state:
            v = self._waiting.pop(param, None)
            state[dual.STATE_KEY] = dual.zeros_for(param) if v is None else v
        result: Tensor = state[dual.STATE_KEY]
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base does."""
        self.base.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict, with "v" in it."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.base.state_dict()
        # V of a base that has not made its own state yet is kept aside; it belongs in the file.
        places = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for param, v in self._waiting.items():
            state_dict["state"].setdefault(places[param], {})[dual.STATE_KEY] = v
        for post in self._optimizer_state_dict_post_hooks.values():
            changed = post(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the base; V keeps float32 or wider. See DessiLBI."""
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre(self, state_dict)
            state_dict = state_dict if changed is None else changed
        given = with_own_options(self, state_dict, OPTIONS)
        # AdamW and others take any state that is not empty for one of their own, so they must
        # not see one that holds V alone.
        alone = {i: s for i, s in given["state"].items() if set(s) == {dual.STATE_KEY}}
        given["state"] = {i: s for i, s in given["state"].items() if i not in alone}
        self.base.load_state_dict(given)
        own_loaded_state(self.base, given)
        ids = [i for group in given["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        self._waiting = {
            p: laid_out(alone[i][dual.STATE_KEY].to(p.device, dual.dual_dtype(p), copy=True), p)
            for i, p in zip(ids, params, strict=True)
            if i in alone
        }
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything deepcopy and pickle need; the base goes along."""
        return {
            "defaults": self.defaults,
            "base": self.base,
            "path_lr": self.path_lr,
            "_options": self._options,
            "_waiting": self._waiting,
            "_fused": self._fused,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`__getstate__` kept; the rest can be made again."""
        super().__setstate__({"_fused": None, **state})
        _WRAPPED.add(self.base)  # the base of a copy is wrapped as well
        self._fusion = _fusion(self._fused)
        self._olds, self._owned, self._refused = {}, None, []

    def __repr__(self) -> str:
        """The base's own description, wrapped."""
        return f"wrap({self.base!r}, kernel: {self.kernel})"

    def gamma(self) -> dict[str, Tensor]:
        """Return Gamma by name; see DessiLBI.gamma."""
        return dual.gamma(self)

    def support(self) -> Ticket:
        """Return supp(Gamma); see DessiLBI.support."""
        return dual.support(self)


def _fusion(fused: bool | None) -> Fusion:
    def asks(group: dict[str, Any]) -> bool | None:
        return False if group["structure"] is None else fused

    return Fusion(asks, _kept, (dual.STATE_KEY,))


def _kept(group: dict[str, Any]) -> tuple[Any, ...]:
    return group["structure"], group["unit"], group["block_scale"]


def _options(group: dict[str, Any], alpha: float | Tensor) -> Options:
    if isinstance(alpha, Tensor) and alpha.device.type == "cpu":
        alpha = float(alpha)
    return Options(alpha, group["kappa"], group["nu"])
