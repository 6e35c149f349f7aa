"""Ctrl-C at every bytecode at which Python may run a signal handler."""

from __future__ import annotations

import dis
import functools
import gc
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.trainees import in_base_step


class InterruptAt:
    """Raises KeyboardInterrupt at the k-th point where CPython looks for signals; else counts.

    Those points are a function's start, the end of a call and a jump backwards. Code of the
    standard library and of torch that runs within the step is included. The garbage collector
    rests meanwhile: Python drops exceptions raised within its callbacks, and Hypothesis has one.
    """

    def __init__(self, k: int | None) -> None:
        self.k = k
        self.count = 0
        self.hit: tuple[str, bool] = ("", False)

    def __enter__(self) -> InterruptAt:
        self._kept = sys.gettrace(), gc.isenabled()
        gc.disable()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        trace, collecting = self._kept
        sys.settrace(trace)
        if collecting:
            gc.enable()

    def _called(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code is InterruptAt.__exit__.__code__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code = opcodes(frame.f_code)
        last = "RESUME"

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            if event == "opcode":
                looked = looks_for_signals(last)
                last = code[frame.f_lasti]
                if looked:
                    self._point(frame)
            return trace

        return trace

    def _point(self, frame: FrameType) -> None:
        self.count += 1
        if self.count - 1 == self.k:
            code = frame.f_code
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
            self.hit = (f"point {self.k}, {place}", in_base_step(frame))
            raise KeyboardInterrupt


@functools.cache
def opcodes(code: CodeType) -> dict[int, str]:
    return {i.offset: i.opname for i in dis.get_instructions(code)}


def looks_for_signals(opname: str) -> bool:
    if opname.endswith("NO_INTERRUPT"):
        return False
    return opname.startswith(("CALL", "RESUME", "JUMP_ABSOLUTE")) or "BACKWARD" in opname
