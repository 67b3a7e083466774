# SPDX-License-Identifier: Apache-2.0
"""What verify says of a run folder: a table of files, and an exit code."""

from pathlib import Path as FilePath

import typer

from dessilbi.cli.terminal import print_json
from dessilbi.columns import paragraph, printable

WIDEST = 44  # columns for the names of files


def verify_run(folder: FilePath, *, as_json: bool) -> None:
    """Check every file of a run folder; exit with 1 if one is damaged or missing."""
    from dessilbi.outcomes.auditing import FAULTS, audit

    findings = audit(folder)
    faults = [finding for finding in findings if finding.state in FAULTS]
    if as_json:
        told = [vars(finding) for finding in findings]
        print_json({"run": str(folder), "sound": not faults, "files": told})
    else:
        width = min(WIDEST, max(len(printable(finding.file)) for finding in findings))
        for finding in findings:
            name = printable(finding.file)
            if len(name) > width:  # a line of its own
                typer.echo(name)
                name = ""
            label = f"{name:{width}}  {finding.state:9}  "
            typer.echo(paragraph(finding.detail, label, indent=4))
        count = len(faults)
        verdict = f"{count} of {len(findings)} are damaged or missing" if count else "sound"
        typer.echo(f"{folder}: {verdict}")
    if faults:
        raise typer.Exit(1)
