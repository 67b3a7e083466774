# SPDX-License-Identifier: Apache-2.0
"""A process killed while it builds the kernel's cache leaves no half library behind."""

import os
import signal
import sys

import chaotic
import pytest

from dessilbi.kernels import building

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
LIBRARY = b"\x7fELF" + bytes(range(256)) * 64

# A compiler that writes its library in two halves, so that there is time to die between them.
COMPILER = f"""#!{sys.executable}
import sys
out = sys.argv[sys.argv.index("-o") + 1]
data = b"\\x7fELF" + bytes(range(256)) * 64
with open(out, "wb") as file:
    file.write(data[: len(data) // 2])
    file.flush()
    file.write(data[len(data) // 2 :])
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DESSILBI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_build_killed_at_any_moment_leaves_a_whole_library_or_none(cache, tmp_path):
    log, died = str(tmp_path / "log"), 0
    for at in range(1, 12):
        fault = chaotic.Fault(at)
        ended = chaotic.run_child(building.build, log, fault)
        died += ended == -signal.SIGKILL
        assert ended in (-signal.SIGKILL, chaotic.OK), chaotic.said(log)
        found = building.find()
        assert found is None or found.read_bytes() == LIBRARY
    assert died >= 1
    assert building.build().read_bytes() == LIBRARY
    assert building.find() is not None
