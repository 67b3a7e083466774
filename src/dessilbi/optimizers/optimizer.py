# SPDX-License-Identifier: Apache-2.0
"""DessiLBI, the optimizer: W learns as under SGD, and V integrates towards the sparse Gamma.

The class only keeps books: the arithmetic is in ``kernels``, what can be read off V in ``dual``.
"""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks.sharding import any_nonzero, like, local
from dessilbi.blocks.structure import Structure
from dessilbi.blocks.ticket import Ticket
from dessilbi.kernels import foreach_step_, reference_step_
from dessilbi.kernels.pieces import Options
from dessilbi.optimizers import dual, fusing
from dessilbi.optimizers.carrying import Fusion
from dessilbi.optimizers.loading import own_loaded_state, with_own_options
from dessilbi.optimizers.options import check_gradient, check_group


class DessiLBI(Optimizer):
    r"""Split linearised Bregman iteration: dense weights W, and beside them a sparse Gamma.

    One step, with g the gradient and V_0 = 0 (docs/mathematics.md):

        g' = g + weight_decay W;  m = momentum m + (1 - dampening) g';  d = m  (or g' + momentum m)
        W  <- W - kappa lr (d + (W - Gamma)/nu)
        V  <- V + lr (W - Gamma)/nu                (old W and Gamma in both lines)
        Gamma = kappa prox(V),   prox(V)_g = max(0, 1 - lam_g/||V_g||) V_g

    Parameters without a structure follow torch.optim.SGD with learning rate kappa lr. Every keyword
    may be set per param group; :func:`dessilbi.param_groups` builds groups from a model.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of either. Names are needed by
            :meth:`gamma`, :meth:`support` and Path only.
        lr: alpha, the step of path time; W moves by kappa * lr. A float or a one-element tensor.
        kappa: Scale between V and Gamma. Redundant: (lr, kappa, nu, lam) gives the W of
            (kappa lr, 1, nu, kappa lam).
        nu: The coupling's strength is 1/nu. What matters is R = T/nu, T = kappa * (sum of lr over
            the whole run): about 10 is a good start, under 3 too weak to make a good ticket.
        lam: Threshold of ||V||; a block enters about when the norm of its time-averaged weight
            exceeds lam nu / (path time). ``inf`` keeps Gamma at zero.
        momentum: As in torch.optim.SGD, on the gradient alone: the coupling stays outside.
        dampening: As in torch.optim.SGD.
        weight_decay: As in torch.optim.SGD. Rarely useful on structured weights, because 1/nu
            already decays what is not selected.
        nesterov: As in torch.optim.SGD.
        structure: Block shape (see :mod:`dessilbi.blocks.structure`), or None: plain SGD.
        unit: Name of the unit the group's tensors belong to; blocks of a unit live or die together.
        block_scale: "unit": lam_g = lam; "sqrt": lam_g = lam sqrt(|g|).
        maximize: Maximise the objective instead.
        foreach: Use torch's multi-tensor operators; None: where that is faster (not on the CPU).
        fused: Use a kernel that does the step in one pass over memory. True builds it at once if it
            is not there (a C++ compiler, some seconds, once per machine and release; a warning
            where that fails); None uses it where it is built and ``foreach`` is None; False: never.
        capturable: Allowed with ``fused`` only, whose step can be captured into a CUDA graph after
            one ordinary step; give lr as a tensor to change it between replays.
        differentiable: Not supported; must be False.

    State per parameter: ``v`` (float32 or wider whatever the weights are; structured ones only) and
    ``momentum_buffer`` (if momentum is not 0). Gamma is never stored.

    Raises:
        ValueError: An argument is out of range, or a structure does not fit its tensor.

    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = DessiLBI(model.named_parameters(), lr=0.1, nu=10.0, lam=0.1, structure="layer")
    >>> model(torch.ones(2, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.support().density
    0.0

    Reference: Fu et al., DessiLBI (ICML 2020, arXiv 2007.02010); Fu et al., Exploring Structural
    Sparsity of Deep Networks via Inverse Scale Spaces (TPAMI 2022, arXiv 1905.09449).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        *,
        kappa: float = 1.0,
        nu: float = 100.0,
        lam: float = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        structure: Structure | None = None,
        unit: str | None = None,
        block_scale: str = "unit",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        if differentiable:
            raise ValueError("differentiable=True is not supported: leave it False")
        if capturable and not fused:
            raise ValueError(
                "capturable=True needs fused=True, whose step on CUDA fits into a captured graph: "
                "set both or neither (a tensor lr is allowed, and is not read by any step)"
            )
        defaults = {
            "lr": lr,
            "kappa": kappa,
            "nu": nu,
            "lam": lam,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "structure": structure,
            "unit": unit,
            "block_scale": block_scale,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        self._placeholders: set[Tensor] = set()
        self._fusion = _fusion()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its structure is checked against its tensors before it is accepted.

        Raises:
            ValueError: An option is out of range or does not fit; the optimizer is unchanged.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            dual.units_of(dual.members(self))
        except Exception:
            self.param_groups.pop()
            raise
        if self.param_groups[-1]["fused"]:
            fusing.prepare(self.param_groups[-1]["params"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in options that older checkpoints do not have."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "differentiable":  # torch's own addition to the defaults
                    group.setdefault(name, default)
        self._placeholders = state.get("_placeholders", set())
        self._fusion = _fusion()

    def __getstate__(self) -> dict[str, Any]:
        """Carry the marks of placeholder buffers through deepcopy and pickle."""
        return {**super().__getstate__(), "_placeholders": self._placeholders}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Advance all parameters that have a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: A gradient is sparse, or members of a unit no longer agree.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_phantom_step(self):
            self._create_state()
            return loss
        fused: AbstractSet[Tensor] = frozenset()
        if not torch.compiler.is_compiling():  # a compiler fuses by itself
            fused = self._fusion.ready(self, [_options(group) for group in self.param_groups])
        self._step_all_but(fused)
        if fused and self._fusion.run(*_scaling(self)):
            self._placeholders -= fused
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave unscaling, and skipping a step, to :meth:`step`."""
        params = [p for group in self.param_groups for p in group["params"]]
        kernels = self._fusion.choice(self).kernels
        return all(p in kernels and kernels[p].name == "fused-cuda" for p in params)

    def _step_all_but(self, fused: AbstractSet[Tensor]) -> None:
        """Step what is not fused, with torch's own operators."""
        rest = [p for group in self.param_groups for p in group["params"] if p not in fused]
        if all(p.grad is None for p in rest):
            return
        for param in rest:
            check_gradient(param)  # all of them, before anything moves
        if (found_inf := _scaling(self)[0]) is not None and found_inf.item():
            return
        found = [m for m in dual.members(self) if m.param not in fused]
        found = [m for m in found if m.param.grad is not None or m.group["unit"] is not None]
        shrinks = dual.shrinks_of(self, found)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p not in fused]
            if params:
                self._step_group(group, params, shrinks)

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], shrinks: dict[Tensor, dual.Shrink]
    ) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        if (scale := _scaling(self)[1]) is not None:
            grads = [grad / scale.to(grad.device) for grad in grads]
        states = [self.state[p] for p in params]
        structured = group["structure"] is not None
        # From here on every rank works on its own part of what is sharded.
        vs = [local(self._v_of(p)) if structured else None for p in params]
        buffers = [
            None
            if p in self._placeholders or "momentum_buffer" not in state
            else local(state["momentum_buffer"])
            for p, state in zip(params, states, strict=True)
        ]
        lr = group["lr"]
        kernel = foreach_step_ if _use_foreach(group["foreach"], params) else reference_step_
        kernel(
            [local(p) for p in params],
            [local(grad) for grad in grads],
            buffers,
            vs,
            [shrinks[p].scale if structured else None for p in params],
            [shrinks[p].block if structured else None for p in params],
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            kappa=group["kappa"],
            nu=group["nu"],
            lam=group["lam"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for param, state, buffer in zip(params, states, buffers, strict=True):
                if param in self._placeholders or "momentum_buffer" not in state:
                    assert buffer is not None
                    state["momentum_buffer"] = like(buffer, param)
            self._placeholders.difference_update(params)

    def _v_of(self, param: Tensor) -> Tensor:
        """V of a parameter, created as zeros on its first step."""
        state = self.state[param]
        if dual.STATE_KEY not in state:
            state[dual.STATE_KEY] = dual.zeros_for(param)
        v: Tensor = state[dual.STATE_KEY]
        return v

    def _buffer_of(self, param: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """Momentum of a parameter, made on its first step, and whether it holds nothing yet."""
        if group["momentum"] == 0:
            return None, False
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
            self._placeholders.add(param)
        return state["momentum_buffer"], param in self._placeholders

    def _create_state(self) -> None:
        """Give every parameter its state without a step, for checkpoints that load in place.

        A momentum buffer made here stands in for "none yet": the first real step fills it as
        torch.optim.SGD fills its first one, without dampening.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if group["structure"] is not None:
                    self._v_of(param)
                self._buffer_of(param, group)

    def __repr__(self) -> str:
        """Groups and options as torch shows them, and the kernel."""
        return f"{super().__repr__().removesuffix(')')}kernel: {self.kernel}\n)"

    @property
    def kernel(self) -> str:
        """What the next step runs on: "fused-cpu", "foreach", "reference", or several with "+"."""
        fused = self._fusion.choice(self).kernels
        kernels = {
            fused[p].name if p in fused else _other_kernel(group, p)
            for group in self.param_groups
            for p in group["params"]
        }
        return "+".join(sorted(kernels))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; V keeps float32 (or wider) under low-precision weights.

        torch casts all floating state to the parameter's dtype, which would ruin V. Loaded
        tensors are copies: the given state dict stays the caller's.
        """
        loaded: dict[str, Any] = {}
        # Registered last, so that it sees what all other hooks made of the state dict.
        pre = self.register_load_state_dict_pre_hook(
            lambda _, given: loaded.update(with_own_options(self, given, self.defaults)) or loaded
        )
        # First among the post hooks, so that the users' see the state as it will be.
        post = self.register_load_state_dict_post_hook(
            lambda _: own_loaded_state(self, loaded), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            pre.remove()
            post.remove()

    def gamma(self) -> dict[str, Tensor]:
        """Return Gamma = kappa prox(V) of every structured tensor, by name.

        Raises:
            ValueError: No group has a structure, or the parameters have no names.
        """
        return dual.gamma(self)

    def support(self) -> Ticket:
        """Return supp(Gamma) as a :class:`~dessilbi.blocks.ticket.Ticket`.

        Raises:
            ValueError: No group has a structure, or the parameters have no names.
        """
        return dual.support(self)


def _fusion() -> Fusion:
    return Fusion(_asks, _kept, (dual.STATE_KEY, "momentum_buffer"))


def _asks(group: dict[str, Any]) -> bool | None:
    fused: bool | None = group.get("fused")
    return False if fused is None and group["foreach"] is not None else fused


def _kept(group: dict[str, Any]) -> tuple[Any, ...]:
    """What a plan of the fused step is made for; other options may change from step to step."""
    names = ("structure", "unit", "block_scale", "foreach", "fused")
    return (*[group.get(name) for name in names], group["momentum"] != 0)


def _options(group: dict[str, Any]) -> Options:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)  # there to be read; a tensor on an accelerator is not
    names = ("kappa", "nu", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return Options(lr, *[group[name] for name in names])


def _scaling(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """found_inf and grad_scale, which GradScaler leaves on the optimizer for the time of a step."""
    return getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)


def _other_kernel(group: dict[str, Any], param: Tensor) -> str:
    return "foreach" if _use_foreach(group["foreach"], [param]) else "reference"


def _use_foreach(foreach: bool | None, params: list[Tensor]) -> bool:
    if foreach is None:
        # As torch.optim: worth it where launches cost, which is not on the CPU.
        return all(p.device.type in ("cuda", "xpu") for p in params)
    return foreach


def is_phantom_step(optimizer: Optimizer) -> bool:
    """Return whether this step only asks for state: every lr is 0 and all gradients are zero.

    Distributed checkpointing makes an optimizer create its state by such a step. A step with
    lr 0 and real gradients is a step.
    """
    if any(_is_nonzero(group["lr"]) for group in optimizer.param_groups):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return not any(any_nonzero(grad) for grad in grads if grad is not None)


def _is_nonzero(lr: float | Tensor) -> bool:
    # Reading a tensor on an accelerator would wait for it; checkpointing puts its zero on the CPU.
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return True
    return float(lr) != 0.0
