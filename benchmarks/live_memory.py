"""Peak of the memory that tensors hold while a function runs, counted and not sampled."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that tensors hold at most while ``function`` runs, beyond those held before.

    On the CPU every allocation and release of torch's allocator is counted through the profiler;
    on an accelerator its allocator counts by itself, and there a release of what was held before
    makes room: drop gradients first to compare the two.
    """
    gc.collect()  # what is released meanwhile would count as this function's
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.accelerator.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        # A float would not hold the nanoseconds that order the events.
        events = json.loads(trace.read_text(), parse_float=Decimal)["traceEvents"]
    live: dict[int, int] = {}  # by address: what was there before is not counted, nor its release
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        held -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            held += size
        peak = max(peak, held)
    return peak
