# SPDX-License-Identifier: Apache-2.0
"""Durable files: old or new but never half, and logs that keep every finished line."""

import contextlib
import errno
import json
import math
import os
import stat
import sys

import pytest

from dessilbi import storage

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


@pytest.fixture
def full_at_fsync(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)


@contextlib.contextmanager
def disk_with_room_for(size):
    """The system itself cuts writes off at ``size`` bytes of a file, as a full disk does."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_whole_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")
    storage.write_atomic(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_written_file_has_the_usual_permissions(tmp_path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    storage.write_atomic(path, b"")
    usual.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.usefixtures("full_at_fsync")
def test_a_failed_flush_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with disk_with_room_for(1000), pytest.raises(OSError, match="too large"):
        storage.write_atomic(path, b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.write_atomic(tmp_path / "nowhere" / "file", b"")


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "log"
    lines = [{"step": k, "text": "zwölf\nParsec \u2028 \r x", "none": None} for k in range(5)]
    for line in lines:
        storage.append_line(path, line)
    assert list(storage.read_lines(path)) == lines
    assert path.read_bytes().count(b"\n") == 5


def test_a_line_that_could_not_be_flushed_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log"
    storage.append_line(path, {"step": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            storage.append_line(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n'
    storage.append_line(path, {"step": 3})
    assert list(storage.read_lines(path)) == [{"step": 1}, {"step": 3}]


@posix
@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_line_torn_by_a_full_disk_is_taken_back(tmp_path, room):
    path = tmp_path / "log"
    storage.append_line(path, {"step": 1})
    before = path.read_bytes()
    with (
        disk_with_room_for(len(before) + room),
        pytest.raises(OSError, match=r"too large|No space"),
    ):
        storage.append_line(path, {"step": 2, "text": "x" * 100})
    assert path.read_bytes() == before


@pytest.mark.parametrize("torn", [b"{", b'{"step": 2', b'{"step": 2}', b"\xff\xfe"])
def test_a_torn_last_line_is_passed_over(tmp_path, torn):
    path = tmp_path / "log"
    storage.append_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + torn)
    assert list(storage.read_lines(path)) == [{"step": 1}]


def test_appending_after_a_torn_line_keeps_every_finished_line(tmp_path):
    path = tmp_path / "log"
    storage.append_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2')  # the process was killed here
    storage.append_line(path, {"step": 3})
    assert list(storage.read_lines(path)) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"3", b"\xff", b"", b"[" * 100_000])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=f"{path}, line 2, is not a JSON object: .*restore it"):
        list(storage.read_lines(path))


def test_an_empty_log_has_no_lines_and_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "log").touch()
    assert list(storage.read_lines(tmp_path / "log")) == []
    with pytest.raises(FileNotFoundError):
        list(storage.read_lines(tmp_path / "nothing"))


def test_numbers_that_json_does_not_know_are_written_as_words(tmp_path):
    value = {"a": math.inf, "b": [-math.inf, (math.nan, 1.5)], "c": {"d": math.inf}, "e": True}
    storage.write_json(tmp_path / "file", value)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "file").read_text(encoding="utf-8")
    expected = {"a": "inf", "b": ["-inf", ["nan", 1.5]], "c": {"d": "inf"}, "e": True}
    assert json.loads(text, parse_constant=refuse) == expected
    assert storage.read_json(tmp_path / "file") == expected


@pytest.mark.parametrize(("word", "number"), [("inf", math.inf), ("-inf", -math.inf), (1.5, 1.5)])
def test_words_for_numbers_read_back_as_numbers(word, number):
    assert storage.from_number(word) == number


@pytest.mark.parametrize("value", [None, "much", True, [1]])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="is not a number"):
        storage.from_number(value)


def test_nan_reads_back():
    assert math.isnan(storage.from_number("nan"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="is not a JSON object: the file is damaged or not ours"):
        storage.read_json(tmp_path / "file")


def test_a_value_that_is_no_json_writes_nothing(tmp_path):
    path = tmp_path / "log"
    storage.append_line(path, {"step": 1})
    for write in (storage.append_line, storage.write_json):
        with pytest.raises(TypeError):
            write(path, {"step": object()})
    assert list(storage.read_lines(path)) == [{"step": 1}]
    assert os.listdir(tmp_path) == ["log"]  # noqa: PTH208
