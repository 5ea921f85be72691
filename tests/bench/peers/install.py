"""Installation of the peers, once, each in an environment of its own under the cache folder.

The folder is `peers/` in $ADAPLEX_CACHE, else in `adaplex` in the XDG cache folder. The project's
environment does not change. Versions are pinned by constraints.txt where it has them, so that torch
is the build that this project uses (configure pip with PyTorch's CPU index where PyPI's build would
install CUDA). vllm.txt is vLLM's whole environment, resolved once.

The recipe of each installation is stored beside it; a changed recipe installs it again.
"""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from adaplex.model.base.source import default_cache

from .system import PeerError, ReportProgress

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[2] / "constraints.txt"
PEFT = ("transformers", "peft")
"""Pinned by constraints.txt, with their requirements."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its sdist has llama.cpp's whole source in vendor/."""
LLAMA_CPP_BACKEND = "scikit-build-core==1.1.2"
"""pip needs the build backend of an sdist even to download it, for its metadata."""
LLAMA_CPP_TOOLS = ("cmake==4.4.4", "ninja==1.13.2")
LLAMA_CPP_CONVERTERS = ("transformers", "protobuf", "sentencepiece==0.2.3")
LLAMA_CPP_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",  # GGML_NATIVE is on by default: all instructions of this CPU
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
LLAMA_CPP_TARGETS = ("llama-server", "llama-quantize")
VLLM = HERE / "vllm.txt"
TCMALLOC = "libtcmalloc-minimal4"
"""Debian's package."""


def folder() -> Path:
    """Returns the folder of the peers' environments and files."""
    return default_cache() / "peers"


def peft(progress: ReportProgress) -> Path:
    """Installs PEFT and returns its environment's python. Raises PeerError."""

    def make(target: Path) -> None:
        _torch_environment(target)
        _pip(target, "-c", str(CONSTRAINTS), *PEFT)

    return _python(_made("peft", _text(PEFT, CONSTRAINTS), make, progress))


def vllm(progress: ReportProgress) -> Path:
    """Installs vLLM and returns its environment's python. Raises PeerError.

    --no-deps omits torchvision, torchaudio and torchcodec, which vLLM requires but does not use for
    text: PyPI's builds of them need CUDA's libraries and fail with a CPU torch.
    """

    def make(target: Path) -> None:
        _torch_environment(target)
        _pip(target, "--no-deps", "-r", str(VLLM))

    return _python(_made("vllm", _text((), CONSTRAINTS, VLLM), make, progress))


def vllm_libraries(progress: ReportProgress) -> list[Path | str]:
    """Returns the libraries that vLLM should preload: tcmalloc and its environment's Intel OpenMP.

    tcmalloc is the system's, else Debian's package, unpacked. Without either vLLM is slower, which
    is reported by `progress`.
    """
    openmp = vllm(progress).parents[1] / "lib" / "libiomp5.so"
    if found := ctypes.util.find_library("tcmalloc_minimal"):
        return [found, openmp]
    try:
        unpacked = _made("tcmalloc", TCMALLOC, _unpack_tcmalloc, progress)
        return [next(unpacked.rglob("libtcmalloc_minimal.so.4")), openmp]
    except (PeerError, OSError) as error:
        progress(f"vLLM runs without tcmalloc, which is slower: install {TCMALLOC} ({error})")
        return [openmp]


def _unpack_tcmalloc(target: Path) -> None:
    _run(target, ["apt-get", "download", TCMALLOC])
    (package,) = target.glob("*.deb")
    _run(target, ["dpkg", "-x", package, "."])


def llama_cpp(progress: ReportProgress) -> Path:
    """Installs llama.cpp and returns its folder, with `env` (for its converters), `source` and
    `build/bin`. Raises PeerError.
    """

    def make(target: Path) -> None:
        _torch_environment(target / "env")
        _pip(target / "env", "-c", str(CONSTRAINTS), *LLAMA_CPP_CONVERTERS)
        _pip(target / "env", *LLAMA_CPP_TOOLS)
        _unpack_source(target)
        tools = target / "env" / "bin"
        given = ["-S", "source", "-B", "build", "-G", "Ninja", *LLAMA_CPP_BUILD]
        _run(target, [tools / "cmake", *given, f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"])
        _run(target, [tools / "cmake", "--build", "build", "--target", *LLAMA_CPP_TARGETS])

    recipe = (LLAMA_CPP, *LLAMA_CPP_TOOLS, *LLAMA_CPP_CONVERTERS, *LLAMA_CPP_BUILD)
    text = _text((*recipe, *LLAMA_CPP_TARGETS))
    return _made("llama.cpp", text, make, progress)


def _unpack_source(target: Path) -> None:
    """Downloads the sdist and moves llama.cpp's source from it to `target`/source."""
    command = ["download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
    _pip(target / "env", LLAMA_CPP_BACKEND)
    _run(target, [_python(target / "env"), "-m", "pip", *command, "-d", target, LLAMA_CPP])
    (archive,) = target.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(target / "sdist", filter="data")
    (source,) = (target / "sdist").glob("*/vendor/llama.cpp")
    source.rename(target / "source")
    shutil.rmtree(target / "sdist")
    archive.unlink()


def _made(name: str, recipe: str, make: Callable[[Path], None], progress: ReportProgress) -> Path:
    """Returns `peers/<name>`, made by `make` unless the same recipe has made it before.

    Raises PeerError if an installation fails.
    """
    target, marker = folder() / name, folder() / name / "recipe.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if marker.is_file() and marker.read_text() == recipe:
            return target
        progress(f"installing {name} into {target} (minutes, once)")
        shutil.rmtree(target, ignore_errors=True)  # of another recipe, or incomplete
        target.mkdir()
        make(target)
        marker.write_text(recipe)
    return target


def _text(names: Sequence[str], *files: Path) -> str:
    return "\n".join([*names, *(file.read_text() for file in files)])


def _torch_environment(target: Path) -> None:
    """Creates an environment with the torch that constraints.txt pins."""
    _run(target.parent, [sys.executable, "-m", "venv", target])
    _pip(target, "-c", str(CONSTRAINTS), "torch")


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _pip(environment: Path, *arguments: str) -> None:
    options = ["install", "-qq", "--disable-pip-version-check"]
    _run(environment, [_python(environment), "-m", "pip", *options, *arguments])


def _run(where: Path, command: Sequence[str | Path]) -> None:
    """Runs a step of an installation. Raises PeerError with the last line of its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = done.stdout.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        step = " ".join(Path(part).name for part in command[:4])
        raise PeerError(f"{step}: {last[0]}")
