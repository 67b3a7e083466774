# SPDX-License-Identifier: Apache-2.0
"""The public surface: light to import, every name there."""

import subprocess
import sys

import pytest

import dessilbi


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_package_does_not_load_torch():
    done = run_python("import sys, dessilbi; print('torch' in sys.modules, dessilbi.__version__)")
    assert done.stdout.split() == ["False", dessilbi.__version__]


def test_the_first_use_of_a_name_loads_it():
    done = run_python("import dessilbi; print(dessilbi.DessiLBI.__module__)")
    assert done.stdout.split() == ["dessilbi.optimizer"]


@pytest.mark.parametrize("name", dessilbi.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(dessilbi, name) is not None
    assert name in dir(dessilbi)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match=r"no attribute 'Dessilbi'; it has \[.*'DessiLBI'"):
        dessilbi.Dessilbi  # noqa: B018
