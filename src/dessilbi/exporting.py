# SPDX-License-Identifier: Apache-2.0
"""Exporting: one file for a runtime, compared once more with the PyTorch model."""

import copy
import importlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import unwrap
from dessilbi.compaction.certifying import left_out, outputs
from dessilbi.compaction.compaction import Compacted
from dessilbi.compaction.comparing import Gap, compare, compared, magnitude
from dessilbi.compaction.proving import check_finite
from dessilbi.files.storage import sync_file, sync_folder
from dessilbi.graph.inputs import Arguments, TensorInput, describe, draw
from dessilbi.graph.program import ExampleInputs, as_arguments, evaluating, export_program, quiet

ONNX_LIMIT = 2**31 - 2**20  # bytes of weights; a protobuf file ends at 2 GiB
RUNTIME_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Runner = Callable[[Arguments], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared with the model.

    ``max_abs_diff`` is the largest difference of any output on the probes, in the model's own
    type. With ``dynamic_batch`` the file takes any batch; another size was compared as well.
    """

    file: Path
    bytes: int
    max_abs_diff: float
    dynamic_batch: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "file": str(self.file), "notes": list(self.notes)}


def export(
    model: nn.Module | Compacted, file: str | Path, *, example_inputs: ExampleInputs
) -> Exported:
    """Write a model for a runtime, and compare the file's answers with the model's.

    Args:
        model: Any model in any mode, or what ``compact`` returned; what is exported is its eval
            mode, on the CPU.
        file: A new file; its ending says the format: ``.onnx`` (runs in onnxruntime), ``.pt2``
            (torch.export; loading one uses pickle, so only load your own) or ``.safetensors``
            (weights and buffers alone).
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.

    Raises:
        FileExistsError: The file exists.
        ValueError: The ending is not known, the model has NaN weights or cannot be followed, or
            the file's answers differ. Nothing is left behind.
        ImportError: ``.onnx`` needs packages that are not installed.
        OSError: The file cannot be written.

    >>> folder = tempfile.mkdtemp()
    >>> x = torch.ones(2, 3)
    >>> export(nn.Linear(3, 2), f"{folder}/model.safetensors", example_inputs=x).max_abs_diff
    0.0
    """
    file = Path(file)
    write = _WRITERS.get(file.suffix)
    if write is None:
        raise ValueError(f"{file} ends in {file.suffix!r}: use {', '.join(_WRITERS)}")
    places = (file, file.with_name(file.name + ".data"))
    for place in places[: 2 if file.suffix == ".onnx" else 1]:
        if place.exists() or place.is_symlink():
            raise FileExistsError(f"{place} exists: nothing is ever overwritten; name another file")
    if file.suffix == ".onnx":
        require_packages(RUNTIME_PACKAGES)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent}: make it or name another file")
    model = model.model if isinstance(model, Compacted) else model
    check_finite(model)
    own = copy.deepcopy(unwrap(model)).cpu()
    args, kwargs = as_arguments(example_inputs)
    here = tuple(_on_cpu(x) for x in args), {name: _on_cpu(x) for name, x in kwargs.items()}
    temporary = Path(tempfile.mkdtemp(dir=file.parent, prefix=f".{file.name}."))
    try:
        with evaluating(own), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporters talk about their own inside
            if reason := _refusal(own, here):
                raise ValueError(
                    f"{type(own).__name__} does not take these example inputs ({reason}): "
                    f"give inputs that forward accepts"
                )
            run, dynamic, notes = write(own, here, temporary / file.name)
            gap = _compare(own, here, run, dynamic)
            notes += (*gap.notes(), *left_out(own, here))
        size = 0
        for written in sorted(temporary.iterdir(), reverse=True):  # the weights before the file
            sync_file(written)
            size += written.stat().st_size
            written.replace(file.parent / written.name)
        sync_folder(file.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(file, size, gap.largest, dynamic, notes)


def require_packages(names: Sequence[str]) -> None:
    """Refuse in one sentence where a package of the extra ``export`` is missing.

    Raises:
        ImportError: It names the packages and the extra.
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ImportError(
            f".onnx needs {', '.join(missing)}, not installed: pip install 'dessilbi[export]'"
        )


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _refusal(model: nn.Module, arguments: Arguments) -> str | None:
    """Return why the model does not take these arguments, None where it does."""
    try:
        outputs(model, [arguments])
    except Exception as error:  # a forward may fail in any way
        return _first_line(error)
    return None


def _compare(model: nn.Module, arguments: Arguments, run: Runner, dynamic: bool) -> Gap:
    """Return the difference on the example, on drawn inputs and on another batch."""
    args, kwargs = arguments
    inputs = describe(args or kwargs)
    probes = [arguments, *draw(inputs, 2)]
    if dynamic:
        batch = next(x.shape[0] for x in inputs if isinstance(x, TensorInput))
        probes += draw(inputs, 1, batch=batch + 1)
    probes = [probe for probe in probes if _refusal(model, probe) is None]
    expected = outputs(model, probes)
    try:
        found = [run(probe) for probe in probes]
    except Exception as error:  # a runtime may fail in any way
        raise ValueError(
            f"the exported file does not run ({_first_line(error)}): export to another format or "
            f"in float32"
        ) from None
    gap = compare(expected, found, exact=False)
    if not gap.within(_allowed):
        raise ValueError(
            f"the exported file answers differently by {gap.largest:.3g} (outputs are up to "
            f"{magnitude(expected):.3g}), {gap.relative:.2g} in the scale of an output: nothing "
            f"was kept; export to another format or report the model"
        )
    return gap


def _allowed(dtype: torch.dtype) -> float:
    """Return what another runtime's rounding may do; it may also decide between near ties."""
    return min(0.05, 1e4 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0.05


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _traced(model: nn.Module, arguments: Arguments) -> tuple[Any, bool, tuple[str, ...]]:
    """Return the exported program, whether its batch is open, and notes."""
    args, kwargs = arguments
    program = export_program(model, args, kwargs)
    dynamic = _any_batch(model, arguments) and _batch_is_open(program)
    if not dynamic:
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be exported with these example inputs "
                f"({_first_line(error)}): give inputs that forward accepts"
            ) from None
    program.example_inputs = None  # they would be stored in a .pt2 file
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # ... and the paths and lines of the user's code
    fixed = ("forward does not allow another batch: the shapes of the inputs are fixed",)
    return program, dynamic, () if dynamic else fixed


def _any_batch(model: nn.Module, arguments: Arguments) -> bool:
    """Return whether the model itself takes another batch."""
    args, kwargs = arguments
    inputs = describe(args or kwargs)
    sizes = {x.shape[0] if x.shape else None for x in inputs if isinstance(x, TensorInput)}
    if len(sizes) != 1 or None in sizes:
        return False
    (other,) = draw(inputs, 1, batch=int(sizes.pop() or 0) + 1)
    return _refusal(model, other) is None


def _batch_is_open(program: Any) -> bool:
    """Return whether all inputs share one open first dimension."""
    names = set(program.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names and isinstance(node.meta["val"], Tensor)
    ]
    firsts: list[Any] = [shape[0] for shape in shapes]
    return len({str(size) for size in firsts}) == 1 and not isinstance(firsts[0], int)


def _write_onnx(
    model: nn.Module, arguments: Arguments, file: Path
) -> tuple[Runner, bool, tuple[str, ...]]:
    import onnxruntime

    program, dynamic, notes = _traced(model, arguments)
    try:
        with quiet("onnx._internal.exporter._registration"):  # on operations of torchvision
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
        tensors = [*model.parameters(), *model.buffers()]
        large = sum(t.numel() * t.element_size() for t in tensors) > ONNX_LIMIT
        for node in made.model.graph:
            node.metadata_props.clear()  # names from inside torch
        made.save(str(file), external_data=large)
        if large:
            notes += (f"the weights lie beside it in {file.name}.data",)
        session = open_session(file)
    except (OSError, ImportError):
        raise
    except Exception as error:  # the exporter and the runtime fail in many ways
        raise ValueError(
            f"{type(model).__name__} cannot be written as ONNX ({_first_line(error)}): export to "
            f".pt2, or change the operation it names"
        ) from None
    assert isinstance(session, onnxruntime.InferenceSession)
    return lambda probe: run_session(session, probe), dynamic, notes


def open_session(file: str | Path) -> Any:
    """Open an ONNX file in onnxruntime: on the CPU, one thread per core of torch, no spinning.

    Live sessions with spinning threads falsify each other's latency.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, arguments: Arguments) -> list[Tensor]:
    """Return the answers of a session to forward's arguments."""
    args, kwargs = arguments
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(tensors):
        raise ValueError(f"it takes {', '.join(names)}, not {len(tensors)} tensors")
    feed = {name: x.detach().cpu().numpy() for name, x in zip(names, tensors, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def _write_pt2(
    model: nn.Module, arguments: Arguments, file: Path
) -> tuple[Runner, bool, tuple[str, ...]]:
    program, dynamic, notes = _traced(model, arguments)
    try:
        torch.export.save(program, file)
        again = torch.export.load(file).module()  # a file we wrote a moment ago
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be written as .pt2 ({_first_line(error)}): export to "
            f".onnx instead"
        ) from None
    return lambda probe: compared(again(*probe[0], **probe[1])), dynamic, notes


def _write_safetensors(
    model: nn.Module, arguments: Arguments, file: Path
) -> tuple[Runner, bool, tuple[str, ...]]:
    del arguments
    try:
        safetensors.torch.save_model(model, str(file))
    except safetensors.SafetensorError as error:
        raise OSError(f"{file.name} could not be written ({error})") from None
    again = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.zero_()
    safetensors.torch.load_model(again, str(file))
    notes = ("weights and buffers alone: the code of the model is needed to use them",)
    return lambda probe: compared(again(*probe[0], **probe[1])), False, notes


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2, ".safetensors": _write_safetensors}
