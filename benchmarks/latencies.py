# SPDX-License-Identifier: Apache-2.0
"""Latencies of a masked and a compacted model, in turns, in PyTorch and onnxruntime.

Besides the wall clock the time of the calling thread is taken: with one thread it tells what the
work costs even where other programs take turns on the core.
"""

import gc
import os
import platform
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch


def environment():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "threads": torch.get_num_threads(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def save_onnx(model, x, file):
    torch.onnx.export(model.eval(), (x,), str(file), dynamo=True, verbose=False)
    return file


def onnx_times(file, x, runs):
    """Latencies with one session, which is gone afterwards; its threads do not spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return timed(lambda: session.run(None, feed), runs)


def torch_times(model, x, runs):
    with torch.no_grad():
        return timed(lambda: model(x), runs)


def timed(call, runs):
    """Milliseconds of ``runs`` calls: by the wall clock, and of this thread."""
    times = []
    for _ in range(runs + 2):
        start, own = time.perf_counter(), time.thread_time()
        call()
        times.append((1e3 * (time.perf_counter() - start), 1e3 * (time.thread_time() - own)))
    return times[2:]


def interleaved(before, after, rounds):
    """Medians over ``rounds`` of medians of before and after: [wall, wall], [thread, thread]."""
    found = [], []
    for _ in range(rounds):
        for each, measure in zip(found, (before, after), strict=True):
            each.append(np.median(measure(), axis=0))
            gc.collect()
    wall, thread = np.transpose([np.median(each, axis=0) for each in found])
    return wall.round(3).tolist(), thread.round(3).tolist()


def measure_latency(masked, small, proof, x, folder, *, runs, rounds):
    """Latencies, and how much of the cut in MACs is realised as a cut in latency."""
    masked, small = masked.eval(), small.eval()
    dense, less = (
        save_onnx(model, x, folder / f"{name}.onnx")
        for name, model in (("dense", masked), ("small", small))
    )
    measures = {
        "torch": (lambda: torch_times(masked, x, runs), lambda: torch_times(small, x, runs)),
        "onnxruntime": (lambda: onnx_times(dense, x, runs), lambda: onnx_times(less, x, runs)),
    }
    cut = 1 - proof.macs_after / proof.macs_before
    record = {}
    for engine, (before, after) in measures.items():
        for clock, times in zip(
            ("wall", "thread"), interleaved(before, after, rounds), strict=True
        ):
            record[f"{engine}_{clock}_ms"] = times
            record[f"{engine}_{clock}_realised"] = round((1 - times[1] / times[0]) / cut, 3)
    return record
