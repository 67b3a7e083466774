# SPDX-License-Identifier: Apache-2.0
"""Maximising: the input that excites one filter or neuron most, by gradient ascent on the input.

Also called activation maximisation. The model stays as it is; only its input moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import unwrap
from dessilbi.graph.program import evaluating

LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
BUDGET = 1 << 30  # bytes of activations that are held at once
START = 0.1  # deviation of the noise that an ascent starts from


@dataclass(frozen=True, eq=False)
class Maximised:
    """What excites the filters of a layer.

    Attributes:
        layer: Name of the layer.
        filters: Indices of its filters or neurons.
        images: The inputs found, one for each: (len(filters), *shape of a sample).
        before: Activation of each filter at the start, the same noise for all: float64.
        after: ... and at the input found.
    """

    layer: str
    filters: tuple[int, ...]
    images: Tensor
    before: Tensor
    after: Tensor


class _Reached(Exception):  # noqa: N818 - no error: the layer has answered
    """Ends a forward pass at the layer of interest."""


def maximise(
    model: nn.Module,
    layer: str,
    *,
    example_inputs: Tensor,
    filters: Sequence[int] | None = None,
    steps: int = 128,
    rate: float = 0.05,
    smoothing: float = 0.05,
    jitter: int = 2,
    seed: int = 0,
) -> Maximised:
    """Find the input that each filter of a layer answers to most.

    The activation a(x) of a filter is the mean of its channel of the layer's output over all
    positions, before any nonlinearity. From noise x (the same for every filter) each step goes

        x <- (1 - rate) x + rate g / rms(g),    g = da/dx at x shifted by up to ``jitter`` pixels
        x <- x + smoothing Laplacian(x)         where x has two or more dimensions of space

    so x is a running mean of normalised gradients: its root mean square stays at or below 1, that
    of normalised data (this is the usual L2 penalty), and the second line is a step down the
    squared total variation, shorter and shorter towards the end. Where the layer is linear in x
    and neither shift nor smoothing acts, x tends to the gradient itself: the filter, up to scale.

    Args:
        model: The model; it is put into eval mode meanwhile and stays unchanged.
        layer: Name of a convolution or linear layer, as ``named_modules`` has it.
        example_inputs: A batch of samples; only shape, type and device of one matter.
        filters: Indices of filters (neurons); by default all. They are treated together, in as
            many batches as it takes to hold about 1 GiB of activations.
        steps: Steps of the ascent.
        rate: In (0, 1]: how far each goes.
        smoothing: In [0, 0.25), at the beginning; it falls to 0.
        jitter: Pixels, at most; at most an eighth of an image's side is used.
        seed: Of the noise at the start and of the shifts.

    Raises:
        ValueError: There is no such layer or filter, a forward pass does not reach the layer, or
            the input cannot move gradually (tokens of a text).

    >>> layer = nn.Linear(4, 2, bias=False)
    >>> found = maximise(nn.Sequential(layer), "0", example_inputs=torch.zeros(1, 4))
    >>> towards = torch.nn.functional.cosine_similarity(found.images, layer.weight)
    >>> bool((towards > 0.999).all()), bool((found.after > found.before).all())
    (True, True)
    """
    _check(steps=steps, rate=rate, smoothing=smoothing, jitter=jitter)
    plain = unwrap(model)
    module = layer_of(plain, layer)
    if not example_inputs.is_floating_point():
        raise ValueError(
            f"inputs of type {example_inputs.dtype} cannot move gradually, so nothing can be "
            f"maximised over them: this takes a model of images or other real numbers"
        )
    sample = example_inputs[:1]
    wanted = _wanted(module, layer, filters)
    generator = torch.Generator().manual_seed(seed)
    noise = START * torch.randn(sample.shape, generator=generator)
    shifts = _shifts(sample.shape[2:], steps, jitter, generator)
    start = noise.to(sample)
    found, before, after = [], [], []
    with evaluating(plain), torch.enable_grad():
        size = _batch_size(plain, module, layer, start)
        for begin in range(0, len(wanted), size):
            part = torch.tensor(wanted[begin : begin + size], device=sample.device)
            x = start.expand(len(part), *sample.shape[1:]).clone()
            before.append(_activations(plain, module, x, part).detach())
            for k, shift in enumerate(shifts):
                x = _step(plain, module, x, part, shift, rate, smoothing * (1 - k / steps))
            after.append(_activations(plain, module, x, part).detach())
            found.append(x)
    told = (torch.cat(values).double().cpu() for values in (before, after))
    return Maximised(layer, tuple(wanted), torch.cat(found), *told)


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """Return a convolution or linear layer of a model by its name.

    Raises:
        ValueError: There is none of this name; the message lists those there are.
    """
    modules = dict(model.named_modules())
    found = modules.get(name)
    if isinstance(found, LAYERS):
        return found
    known = [each for each, module in modules.items() if isinstance(module, LAYERS)]
    if found is not None and name:
        raise ValueError(
            f"{name} is a {type(found).__name__}, which has no filters: "
            f"name a convolution or a linear layer ({listed(known)})"
        )
    raise ValueError(f"there is no layer {name!r}: {meant(name, known)}")


def meant(name: str, known: Sequence[str]) -> str:
    """Return what a person who wrote ``name`` may have meant, and what there is."""
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}? There are {listed(known)}"
    return f"there are {listed(known)}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names with commas between them, in the middle "..." where they are many.

    >>> listed(["a", "b", "c", "d", "e"], most=3)
    'a, b, ..., e'
    """
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join([*names[: most - 1], "...", names[-1]])


def _check(*, steps: int, rate: float, smoothing: float, jitter: int) -> None:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps={steps!r} is not allowed: it must be a whole number >= 1")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate!r} is not allowed: it must be in (0, 1]")
    if not 0 <= smoothing < 0.25:
        raise ValueError(f"smoothing={smoothing!r} is not allowed: it must be in [0, 0.25)")
    if type(jitter) is not int or jitter < 0:
        raise ValueError(f"jitter={jitter!r} is not allowed: it must be a whole number >= 0")


def num_filters(module: nn.Module) -> int:
    """Return how many filters or neurons a layer has."""
    name = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    return int(getattr(module, name))


def _wanted(module: nn.Module, layer: str, filters: Sequence[int] | None) -> list[int]:
    count = num_filters(module)
    wanted = list(range(count)) if filters is None else [int(i) for i in filters]
    bad = [i for i in wanted if not 0 <= i < count]
    if bad or not wanted:
        raise ValueError(
            f"{layer} has {count} filters: name some of 0 to {count - 1}, not {bad or 'none'}"
        )
    return wanted


def _shifts(
    side: Sequence[int], steps: int, jitter: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """By how much the input is shifted along each dimension of space, step by step."""
    most = [min(jitter, n // 8) for n in side] if len(side) > 1 else [0] * len(side)
    drawn = torch.rand(steps, len(side), generator=generator)
    return [
        tuple(int(u * (2 * m + 1)) - m for u, m in zip(row, most, strict=True))
        for row in drawn.tolist()
    ]


def _step(
    model: nn.Module,
    module: nn.Module,
    x: Tensor,
    part: Tensor,
    shift: Sequence[int],
    rate: float,
    smoothing: float,
) -> Tensor:
    dims = tuple(range(2, x.dim()))
    x = x.detach().requires_grad_()
    seen = x.roll(tuple(shift), dims) if dims else x
    # Samples do not see each other in eval mode: the sum's gradient is that of each.
    (g,) = torch.autograd.grad(_activations(model, module, seen, part).sum(), x)
    with torch.no_grad():
        size = g.flatten(1).double().square().mean(1).sqrt().clamp_min(1e-30)
        g = g / size.to(g.dtype).reshape(-1, *[1] * (g.dim() - 1))
        x = (1 - rate) * x + rate * g
        return x + smoothing * _laplacian(x, dims) if len(dims) > 1 else x


def _laplacian(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The sum of differences to the neighbours; none across the border."""
    total = torch.zeros_like(x)
    for dim in dims:
        step = x.diff(dim=dim)
        total.narrow(dim, 0, step.shape[dim]).add_(step)
        total.narrow(dim, 1, step.shape[dim]).sub_(step)
    return total


def _activations(model: nn.Module, module: nn.Module, x: Tensor, part: Tensor) -> Tensor:
    """The mean of channel ``part[i]`` of the layer's output for sample i, over all positions."""
    answers: list[Tensor] = []

    def catch(_: nn.Module, __: Any, output: Tensor) -> None:
        answers.append(output)
        raise _Reached

    handle = module.register_forward_hook(catch)
    try:
        model(x)
    except _Reached:
        pass
    finally:
        handle.remove()
    (output,) = answers
    if isinstance(module, nn.Linear):
        output = output.movedim(-1, 1)
    rows = torch.arange(len(part), device=part.device)
    return output.flatten(2).mean(2)[rows, part] if output.dim() > 2 else output[rows, part]


def _batch_size(model: nn.Module, module: nn.Module, layer: str, start: Tensor) -> int:
    """How many samples to treat at once, judged by the activations of one."""
    counts, reached = [start.numel()], []
    handles = [
        each.register_forward_hook(
            lambda _, __, out: counts.append(out.numel() if isinstance(out, Tensor) else 0)
        )
        for each in model.modules()
        if not list(each.children())
    ]
    handles.append(module.register_forward_hook(lambda *_: reached.append(True)))
    try:
        with torch.no_grad():
            model(start)
    finally:
        for handle in handles:
            handle.remove()
    if not reached:
        raise ValueError(f"a forward pass of this model does not reach {layer}: name another layer")
    return max(1, BUDGET // (8 * sum(counts)))
