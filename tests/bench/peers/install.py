"""Where the peers live: under the cache folder, each in an environment of its own, made once.

$ADAPLEX_CACHE, else `adaplex` in the XDG cache folder; `peers/` in it. Nothing of a peer comes into
the project's environment. Versions are pinned: what constraints.txt names is taken from there, so
that torch is the build that pip finds for us too (give pip PyTorch's CPU index where PyPI's own
build would bring CUDA); vllm.txt is vLLM's whole environment, resolved once.

Each recipe's text is kept beside what it made; a changed recipe makes it again.
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

from .system import PeerError, Progress

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[2] / "constraints.txt"
PEFT = ("transformers", "peft")
"""Pinned by constraints.txt, as is all they need."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its sdist holds llama.cpp's whole source, under vendor/."""
LLAMA_CPP_BACKEND = "scikit-build-core==1.1.2"
"""pip asks an sdist for its metadata even to download it: that needs its build backend."""
LLAMA_CPP_TOOLS = ("cmake==4.4.4", "ninja==1.13.2")
LLAMA_CPP_CONVERTERS = ("transformers", "protobuf", "sentencepiece==0.2.3")
LLAMA_CPP_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",  # with GGML_NATIVE, on by default: all this CPU can do
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
VLLM = HERE / "vllm.txt"
TCMALLOC = "libtcmalloc-minimal4"
"""Debian's package."""


def folder() -> Path:
    """Everything of the peers, their environments and files."""
    return default_cache() / "peers"


def peft(progress: Progress) -> Path:
    """The python of PEFT's environment."""

    def make(target: Path) -> None:
        _torch_environment(target)
        _pip(target, "-c", str(CONSTRAINTS), *PEFT)

    return _python(_made("peft", _text(PEFT, CONSTRAINTS), make, progress))


def vllm(progress: Progress) -> Path:
    """The python of vLLM's environment.

    It goes without torchvision, torchaudio and torchcodec, which vLLM names and does not need for
    text: PyPI's builds of them want CUDA's libraries and fail beside a CPU torch. Hence --no-deps.
    """

    def make(target: Path) -> None:
        _torch_environment(target)
        _pip(target, "--no-deps", "-r", str(VLLM))

    return _python(_made("vllm", _text((), CONSTRAINTS, VLLM), make, progress))


def vllm_libraries(progress: Progress) -> list[Path | str]:
    """What vLLM wants preloaded: Intel's OpenMP of its environment, and tcmalloc.

    tcmalloc is the system's, else Debian's package unpacked here; without either vLLM runs slower,
    and `progress` says so.
    """
    openmp = vllm(progress).parents[1] / "lib" / "libiomp5.so"
    if found := ctypes.util.find_library("tcmalloc_minimal"):
        return [found, openmp]
    try:
        unpacked = _made("tcmalloc", TCMALLOC, _unpack_tcmalloc, progress)
        return [next(unpacked.rglob("libtcmalloc_minimal.so.4")), openmp]
    except (PeerError, OSError) as error:
        progress(f"vLLM goes without tcmalloc, and slower: install {TCMALLOC} ({error})")
        return [openmp]


def _unpack_tcmalloc(target: Path) -> None:
    _run(target, ["apt-get", "download", TCMALLOC])
    (package,) = target.glob("*.deb")
    _run(target, ["dpkg", "-x", package, "."])


def llama_cpp(progress: Progress) -> Path:
    """The folder of llama.cpp: `env` with its converters' needs, `source`, `build/bin`."""

    def make(target: Path) -> None:
        _torch_environment(target / "env")
        _pip(target / "env", "-c", str(CONSTRAINTS), *LLAMA_CPP_CONVERTERS)
        _pip(target / "env", *LLAMA_CPP_TOOLS)
        _unpack_source(target)
        tools = target / "env" / "bin"
        given = ["-S", "source", "-B", "build", "-G", "Ninja", *LLAMA_CPP_BUILD]
        _run(target, [tools / "cmake", *given, f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"])
        _run(target, [tools / "cmake", "--build", "build", "--target", "llama-server"])

    text = _text((LLAMA_CPP, *LLAMA_CPP_TOOLS, *LLAMA_CPP_CONVERTERS, *LLAMA_CPP_BUILD))
    return _made("llama.cpp", text, make, progress)


def _unpack_source(target: Path) -> None:
    """Fetches the sdist into `target` and leaves llama.cpp's source in `target`/source."""
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


def _made(name: str, recipe: str, make: Callable[[Path], None], progress: Progress) -> Path:
    """`peers/<name>`, made by `make` unless the same recipe has made it before. PeerError."""
    target, marker = folder() / name, folder() / name / "recipe.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if marker.is_file() and marker.read_text() == recipe:
            return target
        progress(f"installing {name} into {target} (minutes, once)")
        shutil.rmtree(target, ignore_errors=True)  # another recipe's, or half made
        target.mkdir()
        make(target)
        marker.write_text(recipe)
    return target


def _text(names: Sequence[str], *files: Path) -> str:
    return "\n".join([*names, *(file.read_text() for file in files)])


def _torch_environment(target: Path) -> None:
    """An empty environment with the torch that constraints.txt pins."""
    _run(target.parent, [sys.executable, "-m", "venv", target])
    _pip(target, "-c", str(CONSTRAINTS), "torch")


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _pip(environment: Path, *arguments: str) -> None:
    options = ["install", "-qq", "--disable-pip-version-check"]
    _run(environment, [_python(environment), "-m", "pip", *options, *arguments])


def _run(where: Path, command: Sequence[str | Path]) -> None:
    """Runs a step of an installation; PeerError with the last line that it printed."""
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
        said = done.stdout.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        step = " ".join(Path(part).name for part in command[:4])
        raise PeerError(f"{step}: {said[0]}")
