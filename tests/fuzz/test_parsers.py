# SPDX-License-Identifier: Apache-2.0
"""Parsers on anything at all, shrunk by hypothesis to the smallest text that harms."""

import tempfile
from functools import partial
from pathlib import Path as FilePath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import outcome

from dessilbi import Path, Ticket
from dessilbi.files.runs import Run
from dessilbi.files.sealing import read_seal, sealed, unsealed
from dessilbi.files.storage import from_json, read_json, read_lines, to_json
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.training.data.idx import read_idx
from dessilbi.training.data.pickles import read_pickle
from dessilbi.training.recipes import load_recipe, validate_recipe

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["lenet", "digits", "filter", "nan", "inf", "step", "all"])
)
FIELDS = st.sampled_from(["name", "model", "data", "epochs", "optimizer", "structure", "schedule"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(FIELDS | st.text(), inner),
    max_leaves=20,
)
READERS = {
    "recipe": ("own.toml", lambda file: load_recipe(str(file))),
    "JSON": ("status.json", read_json),
    "status": ("status.json", lambda file: Run(file.parent).read_status()),
    "lines": ("metrics.jsonl", lambda file: list(read_lines(file))),
    "path": ("path.jsonl", lambda file: Path.load(file.parent)),
    "seal": ("checksums.json", lambda file: read_seal(file.parent)),
    "ticket": ("ticket.safetensors", Ticket.load),
    "tensors": ("model.safetensors", load_tensors),
    "idx": ("idx", partial(read_idx, ndim=3)),
    "gzip": ("idx.gz", partial(read_idx, ndim=3)),
    "pickle": ("batch", read_pickle),
}


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield FilePath(name)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
def test_any_bytes_are_refused_in_a_sentence_or_read(folder, kind, data):
    name, read = READERS[kind]
    file = folder / kind / name
    file.parent.mkdir(exist_ok=True)
    text = st.text().map(lambda t: t.encode(errors="replace"))
    tree = TREES.map(lambda t: to_json(t).encode(errors="replace") + b"\n")
    file.write_bytes(data.draw(st.binary() | text | tree))
    outcome(lambda: read(file), kind)


@given(values=st.dictionaries(FIELDS | st.text(), TREES))
def test_any_values_are_a_recipe_or_refused_in_a_sentence(values):
    outcome(lambda: validate_recipe(values, origin="own"), "values")


@given(value=st.dictionaries(st.text(st.characters(codec="utf-8")), TREES), key=st.text())
def test_what_is_sealed_comes_back_and_a_change_is_found(value, key):
    told = from_json(to_json({k: v for k, v in value.items() if k != "checksum"}).encode())
    again = from_json(to_json(sealed(told)).encode())
    assert unsealed(again) == told
    assert unsealed({**again, f"{key}+": "more"}) is None
