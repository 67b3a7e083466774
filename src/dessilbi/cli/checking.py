# SPDX-License-Identifier: Apache-2.0
"""Commands that look at an installation: doctor."""

import typer

from dessilbi.cli.terminal import DataOption, data_root, guarded


@guarded
def doctor(data: DataOption = None) -> None:
    """Say what is installed, which devices and data there are, and whether runs can be written."""
    from dessilbi.reporting.doctor import findings

    for name, value in findings(data_root(data)):
        typer.echo(f"{name:12} {value}")
