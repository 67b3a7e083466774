# SPDX-License-Identifier: Apache-2.0
"""The contract: everything that an optimizer here promises, as checks for anyone's optimizer.

Each check is one promise and takes a *factory*: a callable that is given a list of (name,
parameter) pairs and returns an optimizer for them. The factory keeps no memory between calls.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dessilbi.testing.checkpointing import CHECKPOINTING
from dessilbi.testing.dynamics import DYNAMICS
from dessilbi.testing.grouping import GROUPING
from dessilbi.testing.problem import Factory, NotApplicable
from dessilbi.testing.stepping import STEPPING
from dessilbi.testing.surroundings import SURROUNDINGS

if TYPE_CHECKING:
    import pytest

Check = Callable[[Factory], None]
Expected = Mapping[str | tuple[str, str], str]

GENERIC: tuple[Check, ...] = (*STEPPING, *GROUPING, *SURROUNDINGS, *CHECKPOINTING)
CHECKS: tuple[Check, ...] = (*GENERIC, *DYNAMICS)


def parametrize_with_checks(
    factories: Mapping[str, Factory] | Sequence[Factory],
    expected_failures: Expected | None = None,
) -> "pytest.MarkDecorator":
    """Return a pytest decorator that runs every check on every factory.

    A check about something that an optimizer does not have (Gamma of a plain SGD) is skipped
    and says so.

    Args:
        factories: The optimizers; a mapping gives them names of your choice.
        expected_failures: {check, or (factory, check): why it must fail}; a check that passes
            after all is a failure.

    Returns:
        A decorator for a test with the arguments ``factory`` and ``check``.

    Raises:
        ValueError: ``expected_failures`` names a check or a factory that does not exist.

    >>> import torch
    >>> @parametrize_with_checks({"sgd": lambda named: torch.optim.SGD(named, lr=0.1)})
    ... def test_contract(factory, check):
    ...     check(factory)
    """
    import pytest

    named, expected = name_factories(factories), expected_failures or {}
    _check_expected(named, expected)
    cases = []
    for factory_id, factory in named.items():
        for check in CHECKS:
            reason = _reason(expected, factory_id, check)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            name = check.__name__.removeprefix("check_")
            cases.append(pytest.param(factory, check, id=f"{factory_id}-{name}", marks=marks))
    return pytest.mark.parametrize(("factory", "check"), cases)


def check_optimizer(factory: Factory, expected_failures: Expected | None = None) -> dict[str, str]:
    """Run every check on one factory, without pytest.

    Args:
        factory: Takes a list of (name, parameter) pairs, returns an optimizer.
        expected_failures: {check: why it must fail}.

    Returns:
        The checks that do not apply, with the reason.

    Raises:
        AssertionError: Checks failed; the message lists all of them.
        ValueError: ``expected_failures`` names a check that does not exist.

    >>> import torch
    >>> def plain(named):
    ...     return torch.optim.SGD(named, lr=0.1)
    >>> promise = "check_loading_leaves_the_given_state_dict_alone"
    >>> skipped = check_optimizer(plain, {promise: "torch keeps what it is given"})
    >>> skipped["check_gamma_and_support_agree"]
    'the optimizer has no Gamma'
    """
    ((factory_id, _),) = name_factories([factory]).items()
    expected = expected_failures or {}
    _check_expected({factory_id: factory}, expected)
    failed, skipped = [], {}
    for check in CHECKS:
        reason = _reason(expected, factory_id, check)
        try:
            check(factory)
        except NotApplicable as why:
            skipped[check.__name__] = str(why)
        except Exception as error:
            if reason is None:
                failed.append(f"{check.__name__}: {type(error).__name__}: {error}")
        else:
            if reason is not None:
                failed.append(f"{check.__name__}: passed, but was to fail: {reason}")
    assert not failed, "\n".join([f"{len(failed)} of {len(CHECKS)} checks failed", *failed])
    return skipped


def name_factories(factories: Mapping[str, Factory] | Sequence[Factory]) -> dict[str, Factory]:
    """Return factories by name; those of a sequence are called as their functions, or by place."""
    if isinstance(factories, Mapping):
        return dict(factories)
    named: dict[str, Factory] = {}
    for i, factory in enumerate(factories):
        name = getattr(factory, "__name__", "<lambda>")
        named[f"factory{i}" if name == "<lambda>" or name in named else name] = factory
    return named


def _reason(expected: Expected, factory_id: str, check: Check) -> str | None:
    return expected.get((factory_id, check.__name__), expected.get(check.__name__))


def _check_expected(named: Mapping[str, Factory], expected: Expected) -> None:
    known = [check.__name__ for check in CHECKS]
    for key in expected:
        factory_id, check = (None, key) if isinstance(key, str) else key
        if check not in known:
            raise ValueError(f"expected_failures names {check!r}, which is not a check: {known}")
        if factory_id is not None and factory_id not in named:
            raise ValueError(
                f"expected_failures names the factory {factory_id!r}; there are {list(named)}"
            )
