# SPDX-License-Identifier: Apache-2.0
"""The public surface: light to import, every name there."""

import subprocess
import sys
from importlib.metadata import entry_points
from inspect import getdoc
from pathlib import Path

import pytest
import torch

import dessilbi
from dessilbi.testing import random_ticket

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from surface import FILE, surface


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_package_does_not_load_torch():
    done = run_python("import sys, dessilbi; print('torch' in sys.modules, dessilbi.__version__)")
    assert done.stdout.split() == ["False", dessilbi.__version__]


def test_the_first_use_of_a_name_loads_it():
    done = run_python("import dessilbi; print(dessilbi.DessiLBI.__module__)")
    assert done.stdout.split() == ["dessilbi.optimizers.optimizer"]


@pytest.mark.parametrize("name", dessilbi.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(dessilbi, name) is not None
    assert name in dir(dessilbi)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match=r"no attribute 'Dessilbi'; it has \[.*'DessiLBI'"):
        dessilbi.Dessilbi  # noqa: B018


def test_names_and_parameters_are_those_that_were_agreed_on():
    assert surface() == FILE.read_text(), "run tests/golden/surface.py if this is meant"


@pytest.mark.parametrize("name", sorted(set(dessilbi.__all__) - {"__version__"}))
def test_every_public_name_has_a_docstring_with_an_example(name):
    value = getattr(dessilbi, name)
    assert ">>>" in (getdoc(value) or "")
    for part, member in vars(value).items() if isinstance(value, type) else ():
        if not part.startswith("_") and (callable(member) or isinstance(member, property)):
            assert getdoc(member), f"{name}.{part} says nothing"


def test_the_module_and_the_program_are_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "dessilbi", "--help"], capture_output=True, text=True, check=True
    )
    assert "--install-completion" in done.stdout
    (script,) = entry_points(group="console_scripts", name="dessilbi")
    assert script.value == "dessilbi.cli:main"


def test_what_is_returned_shows_itself_in_a_few_lines():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.ones(2, 4)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    small = dessilbi.compact(model, ticket, example_inputs=x)
    assert repr(small) == f"Compacted(Sequential)\n{small.proof}"
    found = dessilbi.plan(model, {"0.weight": "neuron", "*": None}, example_inputs=x)
    assert repr(found) == str(found)


def test_a_run_that_is_not_there_is_told_before_torch_is_loaded():
    code = "import sys, atexit; from dessilbi.cli import main; sys.argv[1:] = ['ticket', 'nowhere']"
    code += "; atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (1, "False")
    assert "nowhere is not a run folder: it does not exist; name a folder" in done.stderr
