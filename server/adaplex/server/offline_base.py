"""OfflineBase: a base model and one adapter without a server, for offline commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from adaplex.adapters.api import AdapterProgram, BasePolicy, read_adapter
from adaplex.adapters.errors import AdaplexError
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.base.loader import BaseModel
from adaplex.model.constants import KV_BLOCK_TOKENS
from adaplex.model.perplexity import window_blocks
from adaplex.model.runner import ModelRunner
from adaplex.server.build import load, use_threads
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.load_config import load_config
from adaplex.server.open_store import adapter_limits, open_store, require_store


@dataclass(frozen=True)
class OfflineBase:
    """A loaded base, with the settings that it was loaded by."""

    config: ServerConfig
    base: BaseModel

    @classmethod
    def of(cls, flags: Mapping[str, object]) -> OfflineBase:
        """Loads the base that flags, environment or YAML file select. Progress goes to stderr."""
        config = load_config({name: value for name, value in flags.items() if value is not None})
        base = load(config, lambda line: print(line, file=sys.stderr, flush=True))
        use_threads(config, base)
        return cls(config, base)

    def read(self, directory: Path) -> AdapterProgram:
        """Reads and checks an adapter as an upload does.

        Raises AdapterInvalid or AdapterTooLarge.
        """
        policy = BasePolicy(self.config.base_policy)
        return read_adapter(directory, self.base.spec, adapter_limits(self.config), policy)

    def stored(self, selector: str) -> tuple[str, AdapterProgram]:
        """Returns `name@version` and program of a stored adapter. Raises ConfigError for the
        store, and AdapterErrors.
        """
        require_store(self.config)
        registry = open_store(
            self.config, self.base.spec, element_bytes=self.base.dtype.itemsize
        ).registry
        try:
            lease = registry.resolve(selector)
            try:
                record, program = lease.record, registry.programs.program(lease.record.digest)
            finally:
                lease.release()
        finally:
            registry.close()
        return f"{record.name}@{record.version}", replace(program, warnings=lease.warnings)

    def runner(self, program: AdapterProgram, ref: AdapterRef, positions: int) -> ModelRunner:
        """Returns a runner with room for this many positions and the adapter loaded."""
        runner = ModelRunner.for_base(
            self.base,
            num_blocks=window_blocks(positions, KV_BLOCK_TOKENS),
            block_tokens=KV_BLOCK_TOKENS,
            arena_bytes=max(ref.packed_bytes, 1),
        )
        if ref.mode is AdapterMode.MERGED:
            runner.build_merged(program)
        else:
            runner.load_adapter(program, 0, ref.packed_bytes)
        return runner

    def ref(self, name: str, program: AdapterProgram, *, merged: bool) -> AdapterRef:
        """Returns a reference to the adapter, merged if asked or if it can only be merged."""
        mode = AdapterMode.MERGED if merged or program.traits.merged_only else AdapterMode.UNMERGED
        size = program.packed_bytes(self.base.dtype.itemsize)
        return AdapterRef(name, 0, program.digest, size, program.traits, mode)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Prints an error, one line per reason, and exits with code 2."""
    try:
        yield
    except (ConfigError, AdaplexError, ValueError, OSError) as error:
        for reason in getattr(error, "refusals", ()) or [str(error)]:
            typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(2) from error
