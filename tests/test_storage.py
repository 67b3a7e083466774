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

from dessilbi.files import storage

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


def test_a_log_is_cut_back_to_an_earlier_length(tmp_path):
    log = tmp_path / "log"
    storage.append_line(log, {"n": 1})
    length = storage.length_of(log)
    storage.append_line(log, {"n": 2})
    storage.cut_back(log, length["bytes"], length["crc"])
    assert list(storage.read_lines(log)) == [{"n": 1}]
    assert storage.length_of(log) == length
    storage.append_line(log, {"n": 3})
    assert list(storage.read_lines(log)) == [{"n": 1}, {"n": 3}]


def test_a_log_that_is_not_there_has_length_0_and_can_be_cut_to_it(tmp_path):
    assert storage.length_of(tmp_path / "log") == {"bytes": 0, "crc": 0}
    storage.cut_back(tmp_path / "log", 0, 0)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(("size", "crc"), [(1000, None), (9, 1)])
def test_a_log_that_does_not_hold_what_it_should_is_refused_and_left_alone(tmp_path, size, crc):
    log = tmp_path / "log"
    storage.append_line(log, {"n": 1})
    before = log.read_bytes()
    with pytest.raises(storage.DamagedFileError, match=f"no longer holds the {size} bytes"):
        storage.cut_back(log, size, crc)
    assert log.read_bytes() == before


def test_leftovers_of_killed_writers_are_swept_and_nothing_else(tmp_path):
    kept = [tmp_path / "log", tmp_path / ".log", tmp_path / ".other.abcdefgh"]
    for file in (*kept, tmp_path / ".log.abcd_123"):
        file.write_text("x")
    storage.sweep(tmp_path, ["log"])
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_draft_lies_beside_its_place_with_the_usual_permissions(tmp_path):
    draft = storage.draft_folder(tmp_path / "run")
    (tmp_path / "usual").mkdir()
    assert draft.parent == tmp_path
    assert draft.name.startswith(".run.")
    assert draft.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_draft_that_cannot_be_made_names_its_place(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        storage.draft_folder(tmp_path / "no" / "run")
    assert caught.value.filename == str(tmp_path / "no" / "run")


# folders


def test_a_new_folder_is_there_with_all_of_its_files(tmp_path):
    with storage.new_folder(tmp_path / "a" / "b") as place:
        (place / "one").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["one"]
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_may_be_there_already(tmp_path):
    with storage.new_folder(tmp_path) as place:
        (place / "one").write_text("1")
    assert (tmp_path / "one").read_text() == "1"


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fill():
        with storage.new_folder(tmp_path / "a") as place:
            (place / "one").write_text("1")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_new_folder_never_takes_the_place_of_anything(kind, tmp_path):
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
        (target / "one").write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="nothing is ever overwritten"):
        storage.new_folder(target).__enter__()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert storage.sha256_of(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")
