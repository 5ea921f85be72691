"""The choice of an adapter's files in a listing, which all remote sources share."""

from __future__ import annotations

from collections.abc import Mapping

from adaplex.adapters.checkpoint import (
    ADAPTERHUB_WEIGHTS,
    CONFIG,
    FILES,
    NO_PICKLES,
    PICKLE_SUFFIXES,
    SIGNATURE,
    WEIGHTS,
)
from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound, AdapterTooLarge
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.text_files import TEXT_FILES

GGUF = ".gguf"


def choose_files(sizes: Mapping[str, int], limits: AdapterLimits) -> list[str]:
    """Returns the names of the files to fetch, given the bytes of each listed file.

    These are the two files of PEFT or AdapterHub, with a signature and TEXT_FILES if listed; else
    the only GGUF file. Raises AdapterInvalid, AdapterNotFound or AdapterTooLarge.
    """
    weights = next((name for name in (WEIGHTS, ADAPTERHUB_WEIGHTS) if name in sizes), None)
    if weights is not None and CONFIG in sizes:
        chosen = [CONFIG, weights, *([SIGNATURE] if SIGNATURE in sizes else [])]
        largest = limits.max_header_bytes
        chosen += [name for name in TEXT_FILES if sizes.get(name, largest + 1) <= largest]
    else:
        chosen = [name for name in sizes if name.endswith(GGUF)]
        if len(chosen) != 1:
            raise _no_choice(sizes, len(chosen))
    total = sum(sizes[name] for name in chosen)
    if total > limits.max_adapter_bytes:
        raise AdapterTooLarge(
            f"the files have {total} bytes, the limit is {limits.max_adapter_bytes}", field="uri"
        )
    return chosen


def _no_choice(sizes: Mapping[str, int], ggufs: int) -> AdapterInvalid | AdapterNotFound:
    if not sizes:
        return AdapterNotFound("the URI has no files", field="uri")
    if ggufs > 1:
        return AdapterInvalid.because("uri", f"has {ggufs} GGUF files; name one")
    missing = [name for name in FILES if name not in sizes]
    if missing == [WEIGHTS] and any(name.endswith(PICKLE_SUFFIXES) for name in sizes):
        return AdapterInvalid.because("uri", f"its weights file {NO_PICKLES}")
    return AdapterInvalid.because("uri", f"has no {' and no '.join(missing)}")
