# SPDX-License-Identifier: Apache-2.0
"""The input that excites a filter most."""

import copy

import pytest
import torch
from tiny import shared_run
from torch import nn

from dessilbi import maximise, maximising
from dessilbi.training.finetune import load_trained

ALONE = {"jitter": 0, "smoothing": 0.0}


def net():
    """Every kind of layer, with statistics of a batch and a part that no input reaches."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(2, 4, 3),
        "norm": nn.BatchNorm2d(4),
        "relu": nn.ReLU(),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "up": nn.ConvTranspose2d(6, 3, 3),
        "tokens": nn.Linear(14, 5),
        "flat": nn.Flatten(),
        "fc": nn.Linear(3 * 14 * 5, 7),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.fc.register_module("aside", nn.Linear(2, 2))
    return model


IMAGE = torch.zeros(1, 2, 16, 16)


def towards(images, directions):
    return nn.functional.cosine_similarity(images.flatten(1), directions.flatten(1))


def test_the_optimum_of_a_linear_layer_is_the_direction_of_its_weights():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 5))
    found = maximise(model, "1", example_inputs=torch.zeros(1, 2, 8, 8), **ALONE)
    weight = model[1].weight.detach()
    assert towards(found.images, weight).min() > 0.999
    assert towards(found.images, weight.roll(1, 0)).abs().max() < 0.5
    size = found.images.flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(size, torch.ones(5), atol=0.01, rtol=0)
    expected = (found.images.flatten(1) * weight).sum(1) + model[1].bias.detach()
    torch.testing.assert_close(found.after.float(), expected)


def test_the_optimum_of_a_kernel_as_large_as_the_image_is_the_kernel():
    torch.manual_seed(1)
    layer = nn.Conv2d(2, 3, 8)
    found = maximise(nn.Sequential(layer), "0", example_inputs=torch.zeros(1, 2, 8, 8), **ALONE)
    assert towards(found.images, layer.weight.detach()).min() > 0.999


@pytest.mark.parametrize("layer", ["conv2", "conv3", "fc2"])
def test_the_image_excites_its_filter_more_than_random_inputs_of_the_same_size(layer):
    trained = load_trained(shared_run())
    model, blank = trained.model.eval(), trained.data.blank()
    found = maximise(model, layer, example_inputs=blank, steps=24)
    answers = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *a: answers.append(a[2]))
    sizes = found.images.flatten(1).square().mean(1).sqrt()
    noise = torch.randn(64, *blank.shape[1:], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(found.images)
        model(noise * sizes.max() / noise.flatten(1).square().mean(1).sqrt()[:, None, None, None])
    handle.remove()
    image, random = (a.flatten(2).mean(2) if a.dim() > 2 else a for a in answers)
    torch.testing.assert_close(found.after.float(), image.diagonal(), atol=1e-4, rtol=1e-4)
    assert random.std(0).min() > 0
    assert (found.after > found.before).all()
    assert (found.after > random.max(0).values).all()


@pytest.mark.parametrize("layer", ["conv", "grouped", "up", "tokens", "fc"])
def test_every_kind_of_layer_is_excited(layer):
    found = maximise(net(), layer, example_inputs=IMAGE, steps=12)
    count = {"conv": 4, "grouped": 6, "up": 3, "tokens": 5, "fc": 7}[layer]
    assert found.images.shape == (count, 2, 16, 16)
    assert found.filters == tuple(range(count))
    assert (found.after > found.before).all()


@pytest.mark.parametrize(
    ("layer", "sample"),
    [(nn.Conv1d(2, 3, 5), (2, 20)), (nn.Conv3d(1, 3, 3), (1, 6, 6, 6))],
    ids=["1d", "3d"],
)
def test_inputs_of_one_and_three_dimensions_move_as_well(layer, sample):
    found = maximise(nn.Sequential(layer), "0", example_inputs=torch.zeros(1, *sample), steps=12)
    assert found.images.shape == (3, *sample)
    assert (found.after > found.before).all()


def test_a_seed_fixes_the_outcome_to_the_bit():
    one, two, other = (
        maximise(net(), "grouped", example_inputs=IMAGE, steps=6, seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.after, two.after)
    assert not torch.allclose(one.images, other.images, atol=1e-2)


def test_the_global_random_numbers_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 2))
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    maximise(model, "0", example_inputs=torch.zeros(1, 3), steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_filter_alone_and_in_small_batches_finds_the_same_image(monkeypatch):
    whole = maximise(net(), "fc", example_inputs=IMAGE, steps=6)
    alone = maximise(net(), "fc", example_inputs=IMAGE, steps=6, filters=[4, 1])
    torch.testing.assert_close(alone.images, whole.images[[4, 1]])
    monkeypatch.setattr(maximising, "BUDGET", 8 * 10_000)  # two samples at once
    parts = maximise(net(), "fc", example_inputs=IMAGE, steps=6)
    torch.testing.assert_close(parts.images, whole.images)


def test_smoothing_makes_images_smoother():
    rough, smooth = (
        maximise(net(), "fc", example_inputs=IMAGE, steps=12, smoothing=s).images for s in (0, 0.2)
    )

    def variation(x):
        return (x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean()) / x.var()

    assert variation(smooth) < 0.7 * variation(rough)


def test_the_model_stays_as_it_was():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    maximise(model, "fc", example_inputs=IMAGE, steps=3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_of_a_batch_do_not_mix_filters():
    model = net().train()
    alone = maximise(model, "grouped", example_inputs=IMAGE, steps=4, filters=[2])
    among = maximise(model, "grouped", example_inputs=IMAGE, steps=4)
    torch.testing.assert_close(alone.images[0], among.images[2])


def test_it_works_where_gradients_are_switched_off_and_inside_a_wrapper():
    with torch.no_grad():
        found = maximise(nn.DataParallel(net()), "fc", example_inputs=IMAGE, steps=12)
    assert not found.images.requires_grad
    assert (found.after > found.before).all()


@pytest.mark.parametrize(
    ("layer", "options", "words"),
    [
        ("convv", {}, "no layer 'convv': did you mean conv"),
        ("", {}, "there is no layer ''"),
        ("relu", {}, "relu is a ReLU, which has no filters: name a convolution or a linear layer"),
        ("fc.aside", {}, "does not reach fc.aside"),
        ("fc", {"filters": [7]}, r"fc has 7 filters: name some of 0 to 6, not \[7\]"),
        ("fc", {"filters": []}, "not none"),
        ("fc", {"steps": 0}, "steps=0"),
        ("fc", {"rate": float("nan")}, "rate=nan"),
        ("fc", {"smoothing": 0.25}, "smoothing=0.25"),
        ("fc", {"jitter": -1}, "jitter=-1"),
        ("fc", {"example_inputs": torch.zeros(1, 4, dtype=torch.int64)}, "cannot move gradually"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(layer, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        maximise(net(), layer, **({"example_inputs": IMAGE} | options))
    assert "\n" not in str(caught.value)
