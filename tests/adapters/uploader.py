"""Uploads until it is killed, and prints each adapter once it is committed. For test_kill."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import torch

from adapters.handmade import (
    UPLOAD,
    make_registry,
    push,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    root, run = Path(sys.argv[1]), int(sys.argv[2])
    registry = make_registry(root)
    print("ready", flush=True)
    for i in count():
        name = f"run{run}-{i}"
        print(name, push(registry, name, seed=1000 * run + i).record.digest, flush=True)
        if i % 3 == 2:
            registry.names.delete(name, UPLOAD)
            print(name, "-", flush=True)
