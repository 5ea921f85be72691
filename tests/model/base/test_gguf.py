"""How a GGUF file is read while it is converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import gguf_reader

from adaplex.model.base import gguf


def test_a_file_is_mapped_as_a_plain_array_and_numpy_stays_as_it_is(tmp_path: Path) -> None:
    file, memmap = tmp_path / "file", np.memmap
    file.write_bytes(b"GGUF")
    with gguf._plain_arrays():
        data = gguf_reader.np.memmap(file, mode="r")
        assert type(data) is np.ndarray
        assert isinstance(data.base, memmap)
        assert bytes(data) == b"GGUF"
        assert gguf_reader.np.float32 is np.float32
        assert np.memmap is memmap
    assert gguf_reader.np is np
