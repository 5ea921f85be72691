"""OfflineBase: a base and one adapter without a server, for commands that look at an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from adaplex.adapters.errors import AdaplexError
from adaplex.adapters.program.base_match import BasePolicy
from adaplex.adapters.program.program import AdapterProgram
from adaplex.adapters.registry.program_cache import read_adapter
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.base.loader import BaseModel
from adaplex.model.perplexity import window_blocks
from adaplex.model.runner import ModelRunner
from adaplex.server.build import BLOCK_TOKENS, load, use_threads
from adaplex.server.config import ConfigError, ServerConfig
from adaplex.server.load_config import load_config
from adaplex.server.open_store import adapter_limits, existing, open_store


@dataclass(frozen=True)
class OfflineBase:
    """A loaded base, and the settings of `adaplex serve` that it was loaded by."""

    config: ServerConfig
    base: BaseModel

    @classmethod
    def of(cls, flags: Mapping[str, object]) -> OfflineBase:
        """Loads the base that flags, environment or file name; progress goes to standard error."""
        config = load_config({name: value for name, value in flags.items() if value is not None})
        base = load(config, lambda line: print(line, file=sys.stderr, flush=True))
        use_threads(config, base)
        return cls(config, base)

    def read(self, directory: Path) -> AdapterProgram:
        """The adapter, checked as at an upload. Raises AdapterInvalid or AdapterTooLarge."""
        policy = BasePolicy(self.config.base_policy)
        return read_adapter(directory, self.base.spec, adapter_limits(self.config), policy)

    def stored(self, selector: str) -> tuple[str, AdapterProgram]:
        """`name@version` and program of what a selector names in the store, by the settings of a
        server. Raises ConfigError for the store, and AdapterErrors.
        """
        registry = open_store(
            existing(self.config), self.base.spec, element_bytes=self.base.dtype.itemsize
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
        """A runner with room for so many positions, and the adapter in memory."""
        runner = ModelRunner(
            self.base,
            num_blocks=window_blocks(positions, BLOCK_TOKENS),
            block_tokens=BLOCK_TOKENS,
            arena_bytes=max(ref.packed_bytes, 1),
            load_program=lambda _: program,
        )
        if ref.mode is AdapterMode.MERGED:
            runner.build_merged(program.digest)
        else:
            runner.load_adapter(program.digest, 0, ref.packed_bytes)
        return runner

    def ref(self, name: str, program: AdapterProgram, *, merged: bool) -> AdapterRef:
        """The adapter in a mode: merged also where it cannot be otherwise."""
        mode = AdapterMode.MERGED if merged or program.merged_only else AdapterMode.UNMERGED
        return AdapterRef(
            *(name, 0, program.digest, program.packed_bytes(self.base.dtype.itemsize)),
            len(program.modules),
            mode,
            leading=program.leading,
            invocation=program.invocation,
            merged_only=program.merged_only,
        )


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows what is wrong in one line for each reason, and ends with exit code 2."""
    try:
        yield
    except (ConfigError, AdaplexError, ValueError, OSError) as error:
        for reason in getattr(error, "refusals", ()) or [str(error)]:
            typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(2) from error
