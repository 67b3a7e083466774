#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The tests of the library on the oldest torch that pyproject.toml allows, with the extras that go
# with it, in an environment of its own (the first time a large download).
set -e
place=${1:-.venv-oldest}
case $place in /*) ;; *) place=$PWD/$place ;; esac
oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\)",$/\1/p' pyproject.toml)
test -x "$place/bin/python" || "${PYTHON:-python3}" -m venv "$place"
test -x "$place/bin/uv" || "$place/bin/pip" install --quiet --disable-pip-version-check uv
"$place/bin/uv" pip install --quiet --python "$place/bin/python" "torch==$oldest.*" \
  --editable '.[export,lightning,transformers,vision]' pytest hypothesis
"$place/bin/python" -c 'import torch; print("torch", torch.__version__)'
cd tests
# torch 2.11 warns of its own type where a graph that it has exported is copied, and of sparse tensors.
OMP_NUM_THREADS=1 "$place/bin/python" -m pytest -q -m "not full" -p no:cacheprovider \
  -W 'ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning' \
  -W 'ignore:Sparse invariant checks are implicitly disabled:UserWarning' \
  test_structure.py test_optimizer.py test_contract.py test_laws.py test_units.py test_fused.py \
  test_wrapping.py test_path.py test_ticket.py test_groups.py test_coupling.py test_planning.py \
  test_closing.py test_compaction.py test_saving.py test_growth.py test_public.py \
  test_exporting.py test_checkpoints.py training/test_loop.py training/test_resume.py integrations
