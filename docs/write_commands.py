# SPDX-License-Identifier: Apache-2.0
"""Write commands.md from the help that every command gives: python docs/write_commands.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from dessilbi.cli import COMMANDS, app

PAGE = Path(__file__).parent / "commands.md"
WIDTH = 80
HEAD = """# Commands

What `dessilbi --help` and `dessilbi COMMAND --help` say, on one page, after a few examples. Errors
are one sentence on standard error; exit codes: 0 done, 1 failed, 2 bad usage, 130 and 143
interrupted. `--json` prints strict JSON and nothing else. Tables fit 80 columns; there is colour on
a terminal alone, and none where `NO_COLOR` is set. This page is written by
[write_commands.py](write_commands.py).

`dessilbi --install-completion` lets bash, zsh or fish complete commands, options, recipes and files
in shells that are opened from then on; `--show-completion` prints what it would install.

## Examples

    dessilbi recipes show cifar10-resnet20         # every value, as a file to start one's own from
    dessilbi plan mnist-lenet                      # what training it could remove; needs no data
    dessilbi doctor                                # versions, devices, data, write access
    dessilbi doctor mnist-lenet                    # before it trains: R, safe step, first entries
    dessilbi train digits-lenet --set optimizer.nu=12 --out runs/mine
    dessilbi train mnist-lenet-best --density 0.05 # lambda is found; --coupling R sets nu
    dessilbi train folder-resnet18 --data DIR      # DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg
    dessilbi train folder-resnet18 --data DIR --set model=timm:convnext_tiny
    torchrun --nproc-per-node 4 -m dessilbi train cifar10-resnet20 --data DIR [--strategy fsdp2]
    dessilbi ticket RUN --list                     # the family, in numbers
    dessilbi filters RUN --layer conv1 --weights   # the kernels of the first layer themselves
    dessilbi prune-curve RUN --layers conv3,fc1    # by order of entry, by magnitude, at random
    dessilbi verify DIR                            # a smaller model: checksums, and its proof again
    dessilbi verify RUN                            # every file of a run against its checksums
"""


def page() -> str:
    """Return the page."""
    root: Any = get_command(app)
    parts = [HEAD]
    for panel in COMMANDS:
        parts.append(f"## {panel}\n")
        for name, command in root.commands.items():
            if command.rich_help_panel == panel:
                parts += described(command, f"dessilbi {name}")
    return "\n".join(parts)


def described(command: Any, name: str) -> Iterator[str]:
    """Yield a section on a command, and on its own commands."""
    command.rich_markup_mode = None  # else it is drawn with boxes
    context = command.context_class(command, info_name=name, terminal_width=WIDTH)
    told = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"### {name}\n\n```text\n{told}\n```\n"
    for inner, each in getattr(command, "commands", {}).items():
        yield from described(each, f"{name} {inner}")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
