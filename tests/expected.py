# SPDX-License-Identifier: Apache-2.0
"""Golden files: what is printed today is what was printed when somebody last looked at it.

To renew them after a change that is meant: DESSILBI_RENEW_GOLDEN=1 pytest tests/test_golden.py,
then read what `git diff tests/golden` shows, and say in the commit why it moved.
"""

import difflib
import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def assert_golden(name, text):
    """Compare with the golden file of this name, or write it where that is asked for."""
    file = GOLDEN / name
    if os.environ.get("DESSILBI_RENEW_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"{file} is missing: run with DESSILBI_RENEW_GOLDEN=1"
    wanted = file.read_text(encoding="utf-8")
    moved = difflib.unified_diff(
        wanted.splitlines(), text.splitlines(), str(file), "now", "", "", 1
    )
    assert text == wanted, "\n".join(["DESSILBI_RENEW_GOLDEN=1 renews, if it is meant:", *moved])
