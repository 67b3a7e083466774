# SPDX-License-Identifier: Apache-2.0
"""Recipes that say a density, R or a schedule, and what the loop makes of them."""

import math
import warnings
from unittest.mock import patch

import pytest
from tiny import FEW, Recorder, denormals_kept, tiny_recipe, train_tiny
from torch import nn

from dessilbi import Path
from dessilbi.dynamics.monitors import EDGES
from dessilbi.dynamics.scheduling import RAMP
from dessilbi.files.storage import read_json, read_lines
from dessilbi.models import IMAGE_MODELS, MODELS
from dessilbi.training import loop
from dessilbi.training.data import DATA_SETS
from dessilbi.training.engine import engine_for
from dessilbi.training.recipes import RecipeError, load_recipe, validate_recipe
from dessilbi.training.setting import prepare
from dessilbi.training.telling import to_toml

# 40 steps, a point at every one; R = 6 on any number of steps.
STEERED = (
    *("data=few", "model=plain", "validation=100", "batch_size=20", "epochs=8", "points=40"),
    *("optimizer.R=6", "density=0.2", "moving.coupling=[[0, 0], [0.3, 1]]", "judged=2"),
    *('structure={"*.weight" = "element"}',),
)
SAME = ("model", "scores", "path", "metrics")


def plain(num_classes, in_channels):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, num_classes)
    )


@pytest.fixture(autouse=True, scope="module")
def _small_model():
    with (
        patch.dict(MODELS, plain=plain),
        patch.dict(IMAGE_MODELS, plain=plain),
        patch.dict(DATA_SETS, few=FEW),
    ):
        yield


class Stopping(Recorder):
    """Breaks a run off at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def update(self, step, facts):
        super().update(step, facts)
        if step == self.at:
            raise RuntimeError("broken off")


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    reporter = Recorder()
    run = train_tiny(tmp_path_factory.mktemp("steered") / "run", *STEERED, reporter=reporter)
    return run, reporter


def prepared(tmp_path, *assignments):
    recipe = tiny_recipe(tmp_path, *STEERED, *assignments)
    with engine_for("float32", device="cpu") as engine:
        return prepare(recipe, engine)


def test_a_recipe_that_says_a_density_ends_with_it_to_one_block(steered):
    run, _ = steered
    points = Path.load(run.folder).points
    assert 0.2 - 1 / (784 * 12 + 120) < points[-1].density <= 0.2
    assert points[1].density == 0  # before a tenth of the path
    assert read_json(run.status)["density"] == points[-1].density


def test_r_is_told(steered):
    _, reporter = steered
    assert [text for text in reporter.said if text.startswith("R = kappa T/nu = 6 (T = 4)")]


def test_each_epoch_tells_lambda_the_gap_and_how_far_the_blocks_are(steered):
    run, _ = steered
    lines = list(read_lines(run.metrics))
    assert 0 < lines[-1]["lam"] < math.inf
    assert lines[0]["lam"] != lines[-1]["lam"]
    assert all(0 < line["coupling"] < math.inf for line in lines)
    selected = sum(lines[-1]["norms"][EDGES.index(1.0) :])
    assert selected == round(Path.load(run.folder).points[-1].density * (784 * 12 + 120))


def test_the_health_check_stands_in_the_metrics_once_and_names_the_layers(steered):
    run, _ = steered
    (found,) = [x["dead_units"] for x in read_lines(run.metrics) if "dead_units" in x]
    assert set(found) == {"1.weight", "4.weight"}
    assert all(0 <= share < 1 for share in found.values())


@pytest.mark.parametrize("calibrate", ["track", "late"])
def test_a_steered_run_that_was_cut_goes_on_to_the_bit(calibrate, steered, tmp_path):
    options = (*STEERED, f"calibrate={calibrate}", "checkpoint_every=0.2")
    whole = train_tiny(tmp_path / "whole", *options)
    folder = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="broken off"):
        train_tiny(folder, *options, reporter=Stopping(3))
    with pytest.raises(RuntimeError, match="broken off"), denormals_kept():
        loop.resume(folder, reporter=Stopping(22))
    with denormals_kept():
        cut = loop.resume(folder)
    for name in SAME:
        assert getattr(cut, name).read_bytes() == getattr(whole, name).read_bytes(), name
    if calibrate == "track":  # how often it is saved changes nothing either
        assert whole.model.read_bytes() == steered[0].model.read_bytes()
    assert 0 < Path.load(folder).points[-1].density < 1


def test_the_lambda_of_late_gives_the_same_run_from_the_start(tmp_path):
    late = train_tiny(tmp_path / "late", *STEERED, "calibrate=late", "floor=none")
    lam = list(read_lines(late.metrics))[-1]["lam"]
    fixed = [option for option in STEERED if not option.startswith("density")]
    start = train_tiny(tmp_path / "start", *fixed, f"optimizer.lam={lam!r}")
    assert Path.load(late.folder).points[-1].density > 0
    for name in ("model", "path"):
        assert getattr(late, name).read_bytes() == getattr(start, name).read_bytes(), name


def test_moving_options_reach_the_optimizer(tmp_path):
    setting = prepared(tmp_path, "moving.kappa=[[0, 2], [1, 2]]")
    (param,) = [p for n, p in setting.model.named_parameters() if n == "1.weight"]
    nu = setting.optimizer.param_groups[0]["nu"]
    param.grad = param.detach().clone()
    setting.set_lr(0)
    setting.optimizer.step()
    group = setting.optimizer.param_groups[0]
    assert group["kappa"] == 2
    assert group["nu"] == pytest.approx(nu * 0.3 * 40)  # the first of 40 steps


def test_a_weak_coupling_is_warned_about_before_anything_is_written(tmp_path):
    with pytest.warns(UserWarning, match=r"R = kappa T/nu is 2: under 3"):
        prepared(tmp_path, "optimizer.R=2")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["density=1.5"], r"density=1\.5 is not allowed"),
        (["density=0"], r"density=0 is not allowed"),
        (["floor=2"], r"floor=2 is not allowed"),
        (['density={"*" = 7}'], r"density\.\*=7 is not allowed"),
        (["calibrate=soon"], "calibrate='soon' is not allowed"),
        (["freeze=0.6", "calibrate=late"], "freeze=0.6 is not allowed: it is for calibrate"),
        (["moving.lam=[[0, 1]]"], "lam cannot follow a schedule and a density"),
        (["moving.coupling=[[0.5, 1], [0.2, 1]]"], "ascending order of progress"),
        (["moving.nu=[[0, 1]]"], "moving.nu is not a field; moving has coupling, lam, kappa"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_by_name(assignments, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(tmp_path, *STEERED, *assignments)


@pytest.mark.parametrize("assignment", ["freeze=0.6", "calibrate=late"])
def test_how_lambda_is_found_is_not_said_without_a_density(assignment, tmp_path):
    with pytest.raises(RecipeError, match=r"is not allowed: it says how lambda is found"):
        tiny_recipe(tmp_path, assignment)


def test_a_density_that_fits_nothing_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecipeError, match="decides for no structured tensor"):
        train_tiny(tmp_path / "run", *STEERED, 'density={"conv*" = 0.2}')
    assert not (tmp_path / "run").exists()


def test_a_density_per_pattern_and_every_schedule_survive_as_toml(tmp_path):
    recipe = tiny_recipe(tmp_path, *STEERED, 'density={"1.*" = 0.2, "4.*" = 0.5}', "freeze=0.7")
    assert recipe.density == {"1.*": 0.2, "4.*": 0.5}
    file = tmp_path / "own.toml"
    file.write_text(to_toml(recipe))
    assert load_recipe(str(file)) == recipe
    assert validate_recipe(recipe.model_dump(), origin="itself") == recipe


def test_nu_auto_is_r_of_ten_ramped_up(tmp_path):
    recipe = tiny_recipe(tmp_path, "optimizer.nu=auto")
    assert (recipe.optimizer.nu, recipe.optimizer.R) == (None, 10)
    assert recipe.moving.coupling == RAMP
    other = tiny_recipe(tmp_path, "optimizer.nu=auto", "optimizer.R=4", "moving.coupling=[[0, 1]]")
    assert (other.optimizer.nu, other.optimizer.R) == (None, 4)
    assert other.moving.coupling == ((0, 1),)


def test_a_loss_that_does_not_fall_is_warned_about_once(tmp_path):
    stuck = [a for a in STEERED if not a.startswith("moving")]
    with pytest.warns(UserWarning, match="the loss has not fallen: 2") as seen:
        train_tiny(tmp_path / "run", *stuck, "optimizer.lr=1e-6")
    assert len([w for w in seen if "has not fallen" in str(w.message)]) == 1


def test_a_schedule_that_freezes_the_path_and_dead_units_are_warned_about_once(tmp_path):
    slow = ("schedule.kind=step", "schedule.milestones=[2]", "schedule.gamma=0.001")
    options = [a for a in STEERED if not a.startswith(("density", "moving"))]
    dead = patch("dessilbi.training.steering.dead_units", return_value={"1.weight": 0.9})
    with dead, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = train_tiny(tmp_path / "run", *options, "optimizer.R=4", "optimizer.lam=0.05", *slow)
    told = [str(w.message) for w in seen]
    assert len([t for t in told if "decays before most blocks can enter" in t]) == 1
    assert len([t for t in told if "many units are dead: 1.weight (90%)" in t]) == 1
    (found,) = [line for line in read_lines(run.metrics) if "dead_units" in line]
    assert found["dead_units"] == {"1.weight": 0.9}
    assert 0 <= found["can_enter"] < 0.5
