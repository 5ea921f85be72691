from __future__ import annotations

import subprocess
import sys

import pytest

import adaplex
import adaplex.client
from adaplex.client import adapter_types, types
from adaplex.client.cli.commands import COMMANDS, build

SERVER = ("torch", "transformers", "numpy", "pydantic_settings", "adaplex.adapters.api")


def imported(code: str) -> set[str]:
    """Returns the modules that a Python program has imported at its end, also by sys.exit."""
    program = f"import sys\ntry:\n    {code}\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stderr.split())


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import adaplex.client", ("grpc", "google.protobuf", "asyncio")),
        ("import adaplex.client.cli", ("grpc", "google.protobuf", "adaplex.server")),
        (
            "from adaplex.client import Client",
            ("adaplex.client.aio", "adaplex.client.cli", "adaplex.server", "rich", "typer"),
        ),
        ("from adaplex.client import AsyncClient", ("adaplex.server", "rich", "typer")),
        ("import adaplex.client.cli.adapters", ("adaplex.server", "adaplex.client.bench")),
    ],
)
def test_the_client_imports_no_more_than_it_needs(code: str, heavy: tuple[str, ...]) -> None:
    assert imported(code) & {*SERVER, *heavy} == set()


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        ("--help", ("grpc", "adaplex.client.client", "adaplex.client.bench", *SERVER)),
        ("--version", ("grpc", "adaplex.client.client", *SERVER)),
        ("adapters --help", SERVER),
        ("bench punica --help", SERVER),
    ],
)
def test_help_imports_no_client_and_no_server(arguments: str, heavy: tuple[str, ...]) -> None:
    run = f"sys.argv += {arguments.split()!r}; from adaplex.client.cli import main; main()"
    assert imported(run) & set(heavy) == set()


def test_the_help_of_each_command_is_that_of_its_module() -> None:
    for name, text in COMMANDS.items():
        assert build(name).help == text


def test_modules_of_the_client_are_found_without_an_import_of_each() -> None:
    code = "import adaplex.client as c; c.errors.NotFound, c.types.ServerInfo, c.adapters.Adapters"
    assert "adaplex.client.errors" in imported(code)
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        adaplex.client.Clinet  # noqa: B018


def test_the_package_is_a_namespace() -> None:
    assert not hasattr(adaplex, "__file__") or adaplex.__file__ is None


def test_every_public_name_exists_and_every_value_is_public() -> None:
    for name in adaplex.client.__all__:
        assert hasattr(adaplex.client, name)
    for module in (types, adapter_types):
        values = {n for n, kind in vars(module).items() if hasattr(kind, "__dataclass_fields__")}
        assert values <= set(adaplex.client.__all__)


def test_the_values_of_adapters_are_found_in_types_too() -> None:
    own = [
        name
        for name, kind in vars(adapter_types).items()
        if getattr(kind, "__module__", "") == adapter_types.__name__
    ]
    assert "Adapter" in own
    assert [getattr(types, name) for name in own] == [getattr(adapter_types, name) for name in own]


def test_sampling_keywords_are_the_fields_of_sampling_params() -> None:
    fields = types.SamplingParams.__dataclass_fields__
    assert list(types.SamplingFields.__annotations__) == list(fields)
