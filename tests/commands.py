# SPDX-License-Identifier: Apache-2.0
"""The command line as tests call it; a module that does asks for the fixture ``command_line``."""

from typer.testing import CliRunner

from dessilbi.cli import app


def call(*arguments):
    """Run one command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="dessilbi")


def assert_failed(result, code, *words):
    """One line on standard error, nothing on standard output, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert str(word) in result.stderr
