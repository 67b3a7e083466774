# SPDX-License-Identifier: Apache-2.0
"""The public contract suite on every optimizer here, and on two of torch as its control."""

import pytest
import torch

from dessilbi import DessiLBI, wrap
from dessilbi.testing import check_optimizer, parametrize_with_checks
from dessilbi.testing.contract import CHECKS, GENERIC, name_factories
from dessilbi.testing.problem import NotApplicable

STRUCTURES = {
    "element": {"structure": "element"},
    "filter": {"structure": "filter", "nesterov": True},
    "channel": {"structure": "channel", "kappa": 1.0, "block_scale": "sqrt"},
    "layer": {"structure": "layer", "dampening": 0.5},
    "2x2": {"structure": (2, 2), "weight_decay": 1e-3},
    "unit": {"structure": "filter", "unit": True},
    "packed": {"structure": ((1, 1), None)},
}
UNEVEN = ((2, 1), None)


def grouped(named, structure, unit=False):
    """A group per parameter, with the structure where it fits the parameter's shape."""
    if not named:
        return []
    groups = []
    for name, p in named:
        fits = structure
        if isinstance(structure, tuple):
            fits = (*structure, *[None] * (p.dim() - 2)) if p.dim() > 1 else None
            if structure == UNEVEN and (p.dim() < 2 or p.shape[0] % 3):
                fits = None
        elif structure in ("filter", "channel") and p.dim() < 2:
            fits = None
        joint = f"rows {p.shape[0]}" if unit and fits is not None else None
        groups.append({"params": [(name, p)], "structure": fits, "unit": joint})
    return groups


def dessilbi(structure, unit=False, **options):
    options = {"lr": 0.05, "kappa": 1.5, "nu": 0.5, "lam": 1.0, "momentum": 0.5, **options}
    return lambda named: DessiLBI(grouped(named, structure, unit), **options)


def wrapped(kind, structure="filter", unit=False, kappa=1.0, nu=0.5, fuse_coupling=None, **options):
    def factory(named):
        base = kind(grouped(named, structure, unit), **options)
        return wrap(base, nu=nu, lam=1.0, kappa=kappa, fused=fuse_coupling)

    return factory


FACTORIES = {
    f"{name}-{'foreach' if foreach else 'reference'}": dessilbi(foreach=foreach, **options)
    for name, options in STRUCTURES.items()
    for foreach in (False, True)
}
FACTORIES |= {
    "uneven": dessilbi(structure=UNEVEN, block_scale="sqrt"),
    "wrap-sgd": wrapped(torch.optim.SGD, kappa=2.0, lr=0.05, momentum=0.9, nesterov=True),
    "wrap-adamw": wrapped(
        torch.optim.AdamW, structure="element", lr=0.02, kappa=1.5, nu=0.2, eps=1e-3
    ),
    "wrap-adamw-fused": wrapped(torch.optim.AdamW, unit=True, lr=0.02, nu=0.2, fused=True),
    "wrap-muon": wrapped(torch.optim.Muon, structure="channel", lr=0.02, nu=0.2),
    "torch-sgd": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9),
    "torch-adamw": lambda named: torch.optim.AdamW(named, lr=0.02, eps=1e-3),
}
KEPT = "torch keeps references into the state dict it is given"
MATRICES = "torch.optim.Muon takes matrices only"
EXPECTED = {
    ("torch-sgd", "check_loading_leaves_the_given_state_dict_alone"): KEPT,
    ("torch-adamw", "check_loading_leaves_the_given_state_dict_alone"): KEPT,
    ("wrap-muon", "check_vectors_and_scalars_train"): MATRICES,
    ("wrap-muon", "check_channels_last_parameters_train_as_contiguous_ones"): MATRICES,
}


FUSED = {f"{name}-fused": dessilbi(fused=True, **options) for name, options in STRUCTURES.items()}
FUSED |= {
    "wrap-sgd": wrapped(torch.optim.SGD, fuse_coupling=True, kappa=2.0, lr=0.05, momentum=0.9),
    "wrap-adamw-fused": wrapped(
        torch.optim.AdamW, fuse_coupling=True, unit=True, lr=0.02, nu=0.2, fused=True
    ),
}


@parametrize_with_checks(FACTORIES, EXPECTED)
def test_contract(factory, check):
    check(factory)


@parametrize_with_checks(FUSED)
def test_contract_of_the_fused_step(factory, check, built_kernel):
    check(factory)


def outcomes(factory):
    """Which checks fail, and which do not apply."""
    failed, skipped = {}, {}
    for check in CHECKS:
        try:
            check(factory)
        except NotApplicable as why:
            skipped[check.__name__] = str(why)
        except Exception as error:
            failed[check.__name__] = error
    return failed, skipped


class WritesGradients(DessiLBI):
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.zero_()
        return loss


class MovesVTwice(DessiLBI):
    def step(self, closure=None):
        loss = super().step(closure)
        for state in self.state.values():
            if "v" in state:
                state["v"].mul_(1.01)
        return loss


class CastsV(DessiLBI):
    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class IgnoresSchedules(DessiLBI):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


BROKEN = {
    WritesGradients: "check_gradients_are_not_written_to",
    MovesVTwice: "check_steps_agree_with_the_reference_loop",
    CastsV: "check_a_resumed_bfloat16_run_is_the_uninterrupted_one",
    IgnoresSchedules: "check_lambda_lr_is_followed",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_optimizer_is_caught(kind):
    def factory(named):
        return kind(grouped(named, "filter"), lr=0.05, kappa=1.5, nu=0.5, momentum=0.5)

    with pytest.raises(AssertionError, match=BROKEN[kind]):
        check_optimizer(factory)


def test_without_pytest_the_same_checks_run_and_skipped_ones_give_their_reason():
    failed, skipped = outcomes(FACTORIES["torch-sgd"])
    assert list(failed) == ["check_loading_leaves_the_given_state_dict_alone"]
    assert set(skipped.values()) == {"the optimizer has no Gamma", "the optimizer is not DessiLBI"}
    assert not set(skipped) & {check.__name__ for check in GENERIC}
    assert check_optimizer(FACTORIES["torch-sgd"], dict.fromkeys(failed, KEPT)) == skipped


def test_an_expected_failure_that_passes_is_a_failure():
    expected = {"check_loading_leaves_the_given_state_dict_alone": KEPT, "check_the_loss_falls": ""}
    with pytest.raises(AssertionError, match=r"1 of .*\n.*check_the_loss_falls: passed"):
        check_optimizer(FACTORIES["torch-sgd"], expected)
    (mark,) = {
        mark.kwargs["strict"]
        for case in parametrize_with_checks(FACTORIES, EXPECTED).args[1]
        for mark in case.marks
    }
    assert mark is True


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"check_nothing": ""}, "'check_nothing', which is not a check"),
        ({("torch-adam", "check_the_loss_falls"): ""}, "factory 'torch-adam'; there are"),
    ],
)
def test_an_expected_failure_of_something_unknown_is_refused(expected, message):
    with pytest.raises(ValueError, match=message):
        parametrize_with_checks(FACTORIES, expected)


def test_every_check_is_one_promise_with_a_name_of_its_own():
    names = [check.__name__ for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("check_") for name in names)
    assert all(check.__doc__ for check in CHECKS)


def test_factories_of_a_sequence_are_called_as_their_functions():
    def sgd(named):
        return torch.optim.SGD(named)

    assert list(name_factories([sgd, lambda named: sgd(named), sgd])) == [
        "sgd",
        "factory1",
        "factory2",
    ]


def test_every_structure_and_every_base_is_in_the_suite():
    kinds = set()
    for name, factory in FACTORIES.items():
        named = [("weight", torch.nn.Parameter(torch.ones(6, 4)))]
        optimizer = factory(named)
        kinds.add((type(optimizer).__name__, optimizer.param_groups[0].get("structure")))
        if name.startswith("unit"):
            assert optimizer.param_groups[0]["unit"] == "rows 6"
    for structure in ("element", "filter", "channel", "layer", (2, 2)):
        assert ("DessiLBI", structure) in kinds
