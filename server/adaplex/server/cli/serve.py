"""`adaplex serve`. Its flags are the fields of ServerConfig."""

from __future__ import annotations

import sys
from inspect import Signature
from typing import TYPE_CHECKING, Any

import typer

from adaplex.server.errors import ConfigError

if TYPE_CHECKING:
    from adaplex.server.config import ServerConfig


class Serve:
    """Serve one base model, with an adapter per request, over gRPC."""

    def __init__(self) -> None:
        self.__name__ = "serve"
        self.__annotations__: dict[str, Any] = {}  # typer reads it where a function has it

    @property
    def __signature__(self) -> Signature:
        """One keyword per setting, by which typer makes the flags when the command runs."""
        from adaplex.server.cli.flags import signature

        return signature()

    def __call__(self, **options: Any) -> None:
        """Loads and checks the settings, then serves, or prints them for `--print-config`."""
        from adaplex.server.load_config import describe, load_config

        print_config = options.pop("print_config", False)
        flags = {name: value for name, value in options.items() if value not in (None, [])}
        try:
            config = load_config(flags)
            if print_config:
                print(describe(config, flags))
                return
            from adaplex.server import preflight

            preflight.check(config)
            _run(config)
        except ConfigError as error:
            _fail(str(error))


serve = Serve()


def _run(config: ServerConfig) -> None:
    """Builds the server and serves until a signal."""
    # Imported here: these import torch, which --help and --print-config do not need.
    import asyncio

    from adaplex.server import logs

    logs.configure(config.log_level, config.log_format)  # before libraries that log on import

    from adaplex.adapters.errors import AdaplexError
    from adaplex.model.base.source import default_cache
    from adaplex.model.imports.light_imports import light_imports, without_collections
    from adaplex.server.progress import report_progress

    try:
        with report_progress() as progress:
            progress("importing torch and transformers")
            with light_imports(config.cache or default_cache()):
                with without_collections():
                    import transformers.masking_utils  # noqa: F401  # every model imports it

                    from adaplex.server import process
                    from adaplex.server.build import build

                components = build(config, progress)
    except AdaplexError as error:
        _fail(str(error))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(process.run(components))


def _loop_factory() -> Any:
    """Returns uvloop's event loop if installed: it sends almost twice the messages per second."""
    try:
        import uvloop
    except ImportError:  # not built for this platform
        return None
    return uvloop.new_event_loop


def _fail(message: str) -> None:
    for line in message.splitlines():
        print(f"adaplex serve: {line}", file=sys.stderr)
    raise typer.Exit(2)
