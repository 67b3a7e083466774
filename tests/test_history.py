# SPDX-License-Identifier: Apache-2.0
"""The recorded points and supports of a run, and the file they are appended to."""

import errno
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dessilbi.blocks.ticket import TensorSpec
from dessilbi.path.history import NEVER, History, Point

SPECS = {"a": TensorSpec((5, 3), (1, None)), "b": TensorSpec((3, 4), (1, 1))}
UNITS = {"a": "u", "b": None}


def masks_of(seed, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s.grid, generator=generator) < share for n, s in SPECS.items()}


def filled(file=None, *, count=6, every=10, specs=SPECS):
    history = History(specs, UNITS, file)
    for k in range(count):
        history.add(Point(k * every, 0.1 * k, k / 100, by_hand=k == 3), masks_of(k))
        if k % 2:
            history.log({"accuracy": k / 7, "word": "Γ", "nothing": None})
    return history


def same_masks(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def assert_same(left, right):
    assert left.points == right.points
    assert left.specs == right.specs
    assert left.units == right.units
    assert same_masks(left.entries, right.entries)
    for i in range(len(left.points)):
        assert same_masks(left.support(i), right.support(i))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "path.jsonl"


def test_the_support_of_every_point_comes_back_as_it_was_given():
    history = filled()
    for k in range(6):
        assert same_masks(history.support(k), masks_of(k))


def test_the_first_entry_is_the_first_point_that_held_the_block():
    history = filled()
    for name, spec in SPECS.items():
        expected = torch.full(spec.grid, NEVER)
        for k in reversed(range(6)):
            expected[masks_of(k)[name]] = k * 10
        assert torch.equal(history.entries[name], expected)


def test_a_block_that_never_entered_has_no_first_entry():
    history = History(SPECS, {})
    history.add(Point(5, 0.0, 0.0), masks_of(0, share=0.0))
    assert all((entry == NEVER).all() for entry in history.entries.values())


def test_metrics_go_to_the_latest_point_and_add_up():
    history = filled()
    history.log({"accuracy": 1})
    history.log({"loss": 2})
    assert history.points[-1].metrics == {"accuracy": 1, "word": "Γ", "nothing": None, "loss": 2}
    assert history.points[-2].metrics == {}


def test_logging_before_any_point_is_refused(file):
    history = History(SPECS, UNITS, file)
    with pytest.raises(ValueError, match=r"no recorded point to log to yet: call record\(\)"):
        history.log({"loss": 1.0})


def test_steps_are_those_of_the_points():
    assert list(filled().steps()) == [0, 10, 20, 30, 40, 50]


def test_thinning_keeps_points_by_hand_and_multiples_and_their_supports():
    history = filled()
    history.thin(20)
    assert list(history.steps()) == [0, 20, 30, 40, 50]  # 50 is the latest: logs go to it
    for index, k in enumerate((0, 2, 3, 4, 5)):
        assert same_masks(history.support(index), masks_of(k))


def test_thinning_does_not_touch_first_entries():
    history = filled()
    before = {name: entry.clone() for name, entry in history.entries.items()}
    history.thin(1000)
    assert same_masks(history.entries, before)


def test_a_point_after_a_thinning_has_its_own_support():
    history = filled()
    history.thin(40)
    assert list(history.steps()) == [0, 30, 40, 50]
    history.add(Point(60, 1.0, 0.5), masks_of(77))
    assert same_masks(history.support(4), masks_of(77))


@given(
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), max_size=12),
    every=st.integers(1, 5),
    at=st.integers(0, 12),
)
def test_a_loaded_history_is_the_live_one(tmp_path_factory, shares, every, at):
    file = tmp_path_factory.mktemp("history") / "path.jsonl"
    history = History(SPECS, UNITS, file)
    for k, share in enumerate(shares):
        history.add(Point(k, 0.3 * k, share), masks_of(k, share))
        if k % 3 == 0:
            history.log({"k": k})
        if k == at:
            history.thin(every)
    assert_same(History.load(file), history)


def test_units_and_blocks_are_in_the_file(file):
    filled(file)
    loaded = History.load(file)
    assert (loaded.specs, loaded.units) == (SPECS, UNITS)


def test_infinite_path_time_and_density_come_back_as_numbers(file):
    history = History(SPECS, UNITS, file)
    history.add(Point(1, float("inf"), 0.5), masks_of(0))
    assert History.load(file).points[0].time == float("inf")


def test_an_infinite_metric_comes_back_as_a_number(file):
    history = filled(file)
    history.log({"loss": float("inf")})
    assert_same(History.load(file), history)


def test_the_file_is_strict_json_lines_with_supports_of_a_few_bytes(file):
    specs = {"w": TensorSpec((1000, 100), (1, 1))}
    history = History(specs, {}, file)
    mask = torch.zeros(1000, 100, dtype=torch.bool)
    for k in range(20):
        mask[k, :7] = True
        history.add(Point(k, 0.1 * k, float(mask.float().mean())), {"w": mask})
    lines = file.read_text().splitlines()

    def refuse(word):
        raise AssertionError(word)

    assert len([json.loads(line, parse_constant=refuse) for line in lines]) == 21
    assert max(map(len, lines)) < 1000  # 12,500 bytes of packed bits each, before the deltas
    assert torch.equal(History.load(file).support(19)["w"], mask)


def test_an_existing_file_is_refused_and_left_alone(file):
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=f"{file} exists already: a path is never overwr"):
        History(SPECS, UNITS, file)
    assert file.read_text() == "mine"


def test_a_file_cut_off_anywhere_loads_as_a_prefix_or_says_that_it_has_no_header(file, tmp_path):
    whole = filled(file, count=3)
    content = file.read_bytes()
    header = content.index(b"\n") + 1
    cut = tmp_path / "cut.jsonl"
    lengths = set()
    for length in [*range(0, header, 9), *range(header - 1, len(content) + 1)]:
        cut.write_bytes(content[:length])
        if length < header:
            with pytest.raises(ValueError, match=r"not a readable path \(no path header\)"):
                History.load(cut)
            continue
        loaded = History.load(cut)
        lengths.add(len(loaded.points))
        for i, point in enumerate(loaded.points):
            assert point.step == whole.points[i].step
            assert same_masks(loaded.support(i), whole.support(i))
    assert lengths == {0, 1, 2, 3}


def flips(content):
    for i in range(len(content)):
        yield content[:i] + bytes([content[i] ^ (1 << (i * 5 % 8))]) + content[i + 1 :]


def test_a_flipped_bit_gives_a_history_or_one_value_error(file):
    filled(file, count=3)
    content = file.read_bytes()
    messages = []
    for damaged in flips(content):
        file.write_bytes(damaged)
        try:
            History.load(file)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > len(content) / 4
    assert not any("\n" in message for message in messages)


def test_a_flipped_bit_never_gives_another_history(file):
    whole = filled(file, count=3)
    content = file.read_bytes()
    refused = 0
    for damaged in flips(content):
        file.write_bytes(damaged)
        try:
            loaded = History.load(file)
        except ValueError:
            refused += 1
            continue
        # What is left is a torn last line, passed over as after a crash.
        assert loaded.points == whole.points[: len(loaded.points)]
        for i in range(len(loaded.points)):
            assert same_masks(loaded.support(i), whole.support(i))
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"PK\x03\x04\n" * 9, b"\xff" * 64 + b"\n", b"hello\nworld\n", b"[1]\n", b"{}\n"],
    ids=repr,
)
def test_a_foreign_file_is_refused(content, file):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.* is not .* from a copy or train again"):
        History.load(file)


def test_a_newer_format_is_refused_with_both_versions(file):
    filled(file)
    file.write_text(file.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(ValueError, match="format version 2, this release reads 1"):
        History.load(file)


def append_as_ours(file, line):
    """Append a line with the checksum it needs, as a hostile writer would."""
    history = History.load(file)
    history.file = file
    history._write(line)


def line_of(step=60, **changes):
    point = {"step": step, "time": 1.0, "density": 0.5, "by_hand": False}
    return {"point": point | changes, "delta": "eJw="}


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ({}, "a line with nothing"),
        ({"x": 1, "a": 2}, "a line with a, x"),
        ({"log": {"step": 3, "metrics": {}}}, "a log without its point"),
        ({"log": []}, "list indices"),
        ({"thin": 3}, "not iterable"),
        ({"point": {}}, "time"),
        (line_of(), "a support of the wrong size"),
        (line_of(step="x"), "invalid literal"),
        (line_of(density="much"), "is not a number"),
        ({**line_of(), "delta": "?"}, "base64"),
        ({**line_of(), "delta": "AAAA"}, "Error -3"),
    ],
    ids=str,
)
def test_a_line_of_garbage_is_refused_with_what_is_wrong(line, detail, file):
    filled(file)
    append_as_ours(file, line)
    with pytest.raises(ValueError, match=rf"is not a readable path \(.*{detail}.*\): it is dam"):
        History.load(file)


def test_a_missing_line_is_noticed(file):
    filled(file)
    lines = file.read_text().splitlines(keepends=True)
    del lines[2]
    file.write_text("".join(lines))
    with pytest.raises(ValueError, match="does not match its checksum, or one is missing"):
        History.load(file)


def without(word):
    return [line_of(**{word: None}), line_of(step=float("inf"))]


@pytest.mark.parametrize("line", [*without("time"), *without("density")[:1]], ids=str)
def test_a_point_without_a_number_is_refused_with_a_value_error(line, file):
    filled(file)
    append_as_ours(file, line)
    with pytest.raises(ValueError, match="is not a readable path"):
        History.load(file)


@pytest.mark.parametrize("shape", [[-3, 2], [2**40, 2**40], [2**27, 1]], ids=str)
def test_a_header_with_an_impossible_shape_is_refused_with_a_value_error(shape, file):
    tensors = {"w": {"shape": shape, "block": [1, None], "unit": None}}
    file.write_text(
        json.dumps({"format": "dessilbi.path", "version": 1, "tensors": tensors}) + "\n"
    )
    with pytest.raises(
        ValueError, match=r"is not a readable path|claims to be the path of [0-9,]+ blocks"
    ):
        History.load(file)


def test_a_damaged_line_is_told_once(file):
    filled(file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], "gone\n", *lines[4:]]))
    with pytest.raises(ValueError, match="line 4") as caught:
        History.load(file)
    assert str(caught.value).count("restore it from a copy") == 1


def test_a_missing_file_is_a_file_not_found_error(file):
    with pytest.raises(FileNotFoundError):
        History.load(file)


@pytest.mark.parametrize("verb", ["add", "log", "thin"])
def test_a_full_disk_changes_neither_file_nor_memory(verb, file, monkeypatch):
    history = filled(file)
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    call = {
        "add": lambda: history.add(Point(60, 1.0, 0.5), masks_of(8)),
        "log": lambda: history.log({"loss": 1.0}),
        "thin": lambda: history.thin(20),
    }[verb]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            call()
    assert file.read_bytes() == before
    assert_same(history, filled())
    call()
    assert_same(History.load(file), history)


def test_a_history_can_be_made_of_tensors_without_blocks():
    history = History({"none": TensorSpec((0, 3), (1, None))}, {})
    history.add(Point(1, 0.1, 0.0), {"none": torch.zeros(0, 1, dtype=torch.bool)})
    assert history.support(0)["none"].shape == (0, 1)
