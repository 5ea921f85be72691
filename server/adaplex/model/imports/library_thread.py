"""Loading of torch's library on a thread, while the interpreter imports modules without torch."""

from __future__ import annotations

import ctypes
import os
from importlib.machinery import PathFinder
from pathlib import Path
from threading import Thread

LIBRARIES = {
    "libtorch_global_deps.so": os.RTLD_NOW | os.RTLD_GLOBAL,
    "libtorch_cpu.so": os.RTLD_NOW,
}
"""Library -> how torch loads it, in this order."""
CUDA_LIBRARY = "libtorch_cuda.so"


def load_library_of_torch() -> Thread | None:
    """Starts a thread that loads the library of a torch for the CPU, where `import torch` then
    finds it; returns None for other builds, whose dependencies torch has to find itself.
    """
    spec = PathFinder.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    if (folder / CUDA_LIBRARY).exists() or not all((folder / name).exists() for name in LIBRARIES):
        return None
    thread = Thread(target=_load, args=(folder,), name="torch-library")
    thread.start()
    return thread


def _load(folder: Path) -> None:
    """Calls dlopen as a foreign function, which leaves the interpreter to others meanwhile. A
    library that cannot be loaded is reported by `import torch`.
    """
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for name, mode in LIBRARIES.items():
        dlopen(os.fsencode(folder / name), mode)
