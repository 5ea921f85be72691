"""PatientBuild: a build that its caller need not wait for to the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread

from adaplex.model.kernels.native.build import BuildFailed
from adaplex.model.progress import Progress


class PatientBuild:
    """Runs a build on a thread that ends with the process, and its compilers with it."""

    def __init__(self, build: Callable[[Progress], None]) -> None:
        """`build` gets a function for lines of progress."""
        self._build = build
        self._events: SimpleQueue[str | BaseException | None] = SimpleQueue()
        """Lines of progress, then an error, or None at the end."""
        Thread(target=self._run, name="kernel-build", daemon=True).start()

    def wait(self, seconds: float, progress: Progress) -> None:
        """Waits for the end of the build, and passes its lines on. Raises what the build raises,
        or BuildFailed after so many seconds; the build then goes on without lines.
        """
        end = time.monotonic() + seconds
        try:
            while isinstance(event := self._next(end), str):
                progress(event)
        except Empty:
            raise BuildFailed(
                f"their build is not done after {seconds:.0f} s; it goes on, for the next start"
            ) from None
        if event is not None:
            raise event

    def _next(self, end: float) -> str | BaseException | None:
        if math.isinf(end):
            return self._events.get()
        return self._events.get(timeout=max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        try:
            self._build(self._events.put)
        except BaseException as error:
            self._events.put(error)
        else:
            self._events.put(None)
