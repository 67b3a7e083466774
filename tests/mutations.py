# SPDX-License-Identifier: Apache-2.0
"""Damage: the same file with bits flipped, parts lost, swapped or blown up; always the same ones.

``outcome`` reads a damaged file under limits: ten seconds, one gibibyte, one sentence.
"""

import json
import random
import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from dessilbi.files.runs import TrainingError

LONGEST = 10.0  # seconds
LARGEST = 1 << 30  # bytes
SENTENCE = 1500  # characters; a message is not a dump

HOSTILE_NUMBERS = (b"1e999", b"-1", b"NaN", b"Infinity", b"9" * 40, b"9" * 5000, b"0.5", b"true")
HOSTILE_WORDS = (
    b'"../../etc/passwd"',
    b'"/etc/passwd"',
    b'"\\u0000"',
    b'"\\ud800"',
    b"null",
    b"[]",
)


def flip_bit(data, drawn):
    """One bit."""
    at = drawn.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << drawn.randrange(8)]) + data[at + 1 :]


def flip_many(data, drawn):
    """Some bytes, anywhere."""
    content = bytearray(data)
    for _ in range(drawn.randint(2, 40)):
        content[drawn.randrange(len(content))] = drawn.randrange(256)
    return bytes(content)


def truncate(data, drawn):
    """The end is lost."""
    return data[: drawn.randrange(len(data))]


def cut_line_end(data, drawn):
    """The last lines are lost, whole ones."""
    lines = data.splitlines(keepends=True)
    return b"".join(lines[: drawn.randrange(len(lines))])


def lose_middle(data, drawn):
    """A part in the middle is lost."""
    start, end = sorted(drawn.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def swap(data, drawn):
    """Two parts change places."""
    a, b, c, d = sorted(drawn.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def repeat(data, drawn):
    """A part is there many times."""
    start, end = sorted(drawn.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * drawn.randint(1, 50) + data[end:]


def empty(data, drawn):
    """Nothing is left."""
    return b""


def zeros(data, drawn):
    """A part is zeros, as after a power cut."""
    start, end = sorted(drawn.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + bytes(end - start) + data[end:]


def foreign(data, drawn):
    """Something else altogether."""
    junk = [b"\x00" * 64, b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe\x00\x00", b"PK\x03\x04"]
    junk += [b"[]\n", b"null", b"{}", b"\x80\x04.", b"\n" * 1000, b"\xff" * 9]
    return drawn.choice([*junk, (1 << 62).to_bytes(8, "little")])


def other_number(data, drawn):
    """A number becomes an absurd one."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return flip_bit(data, drawn)
    start = end = drawn.choice(places)
    while end < len(data) and chr(data[end]) in "0123456789.eE+-":
        end += 1
    return data[:start] + drawn.choice(HOSTILE_NUMBERS) + data[end:]


def other_word(data, drawn):
    """A word becomes a path, a broken character or nothing."""
    places = [i for i, byte in enumerate(data[:-1]) if byte == ord('"')]
    if len(places) < 2:
        return flip_many(data, drawn)
    start = drawn.choice(places[:-1])
    end = data.index(b'"', start + 1)
    return data[:start] + drawn.choice(HOSTILE_WORDS) + data[end + 1 :]


WAYS = (
    *(flip_bit, flip_bit, flip_many, truncate, truncate, cut_line_end, lose_middle, swap, repeat),
    *(empty, zeros, foreign, other_number, other_number, other_word),
)


def mutations(data, count, seed):
    """Yield ``count`` damaged copies, each with the name of what was done; never equal to it."""
    drawn = random.Random(seed)
    number = 0
    while number < count:
        way = WAYS[number % len(WAYS)] if number < len(WAYS) else drawn.choice(WAYS)
        damaged = way(data, drawn)
        if damaged != data:
            number += 1
            yield f"{number} {way.__name__}", damaged


def rewritten(content, change):
    """A JSON object after a change, as text."""
    told = json.loads(content)
    change(told)
    return json.dumps(told, indent=2).encode()


@dataclass(frozen=True)
class Outcome:
    """What came of reading a damaged file."""

    value: object = None
    error: Exception | None = None


# What a reader may raise: a sentence for people. Anything else is a traceback.
ALLOWED = (ValueError, OSError, ImportError, TrainingError)


def outcome(read, name):
    """Read, and return a value or an error of one sentence.

    Raises:
        AssertionError: It took too long, or failed in another way than with a sentence.
    """
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Outcome(value=read())
    except Exception as error:  # looked at below
        found = Outcome(error=error)
    if found.error is not None:
        try:
            _check_sentence(found.error, name)
        except AssertionError as failure:
            raise failure from found.error  # where it came from
    taken = time.process_time() - began
    assert taken < LONGEST, f"{name} took {taken:.1f} s"
    return found


def _check_sentence(error, name):
    """An error is of a kind that commands print, and says one sentence."""
    told, text = f"{name}: {error!r}"[:3000], str(error)
    assert isinstance(error, ALLOWED), told
    assert not isinstance(error, json.JSONDecodeError | UnicodeError), told
    assert text.strip(), told
    assert "\n" not in text, told
    assert len(text) < SENTENCE, told
    assert "MemoryError" not in text, told
    assert "allocate" not in text, told


class Memory:
    """How much more memory a block asked for at its peak, and a limit on what it may ask for."""

    def __enter__(self):
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + LARGEST, self._limits[1]))
        return self

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self._limits)


def _mapped():
    """Bytes of address space this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
