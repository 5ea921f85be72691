"""`adaplex adapters eval`: what an adapter gained and forgot, as perplexities of texts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaplex.client.cli import render
from adaplex.server.cli.store import ConfigFile, SharedStore, StoreDir
from adaplex.server.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from adaplex.adapters.program.program import AdapterProgram
    from adaplex.engine.request import AdapterRef
    from adaplex.server.offline_base import OfflineBase

Adapter = Annotated[
    str,
    typer.Argument(
        help="Adapter directory; else what is stored as name, name@version, name@alias or digest."
    ),
]
Files = Annotated[
    list[Path],
    typer.Option("--file", exists=True, dir_okay=False, help="Text in UTF-8; repeat for more."),
]
Model = Annotated[str | None, typer.Option(help="Base model, as for `adaplex serve`.")]
Quantization = Annotated[str | None, typer.Option(help="How the base is kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class TextScore:
    """Perplexities of one text."""

    file: str
    tokens: int
    """That were scored: each has some before it in its window."""
    base: float
    adapter: float

    @property
    def ratio(self) -> float:
        """Below 1 the adapter expects the text more than the base does, above 1 less."""
        return self.adapter / self.base


def evaluate(
    adapter: Adapter,
    file: Files,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are seen at once.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from one window to the next; half of one if unset."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Of each text, the first ones.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Measure the merged mode.")] = False,
    model: Model = None,
    quantization: Quantization = None,
    store_dir: StoreDir = None,
    shared_store: SharedStore = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of texts by the base and by an adapter, without a server."""
    from adaplex.server.offline_base import OfflineBase, errors_as_messages  # brings torch

    with errors_as_messages():
        texts = {path: path.read_text(encoding="utf-8") for path in file}
        directory = _directory(adapter)
        bench = OfflineBase.of(
            {
                **{"model": model, "quantization": quantization, "config": config},
                **{"store_dir": store_dir, "shared_store": shared_store},
            }
        )
        if directory is None:
            name, program = bench.stored(adapter)
        else:
            name, program = directory.name, bench.read(directory)
        ids = {path: _tokens(bench, path, text, max_tokens) for path, text in texts.items()}
        step = min(stride or max(window // 2, 1), window)
        scores = _scores(bench, name, program, ids, window, step, merged=merged)
    render.warnings(program.warnings)
    if as_json:
        shown = {
            "model": bench.base.spec.name,
            "quantization": bench.base.quantization,
            "adapter": {"name": name, "family": program.family, "digest": program.digest},
            "texts": [asdict(score) | {"ratio": score.ratio} for score in scores],
        }
        typer.echo(json.dumps(shown, indent=2))
        return
    render.table(
        ("TEXT", "TOKENS", "BASE", "ADAPTER", "ADAPTER / BASE"),
        [(s.file, s.tokens, f"{s.base:.3f}", f"{s.adapter:.3f}", f"{s.ratio:.3f}") for s in scores],
    )


def _directory(adapter: str) -> Path | None:
    """The directory, None where it is a selector. Raises ConfigError when it can be neither."""
    from adaplex.adapters.storage.selector import Selector

    if Path(adapter).is_dir():
        return Path(adapter)
    if Selector.parse(adapter) is None:
        raise ConfigError(f"{adapter}: there is no such directory, and no adapter has such a name")
    return None


def _tokens(bench: OfflineBase, path: Path, text: str, most: int | None) -> tuple[int, ...]:
    """The first tokens of a text."""
    from adaplex.server.text import encode_text

    ids = encode_text(bench.base.tokenizer, text)[:most]
    if len(ids) < 2:
        raise ConfigError(f"{path}: has {len(ids)} tokens, at least 2 are needed")
    return ids


def _scores(
    bench: OfflineBase,
    name: str,
    program: AdapterProgram,
    texts: dict[Path, tuple[int, ...]],
    window: int,
    stride: int,
    *,
    merged: bool,
) -> list[TextScore]:
    """Every text by the base, then by the adapter."""
    from adaplex.model.perplexity import token_losses
    from adaplex.server.build import BLOCK_TOKENS

    positions = program.leading + min(window, max(map(len, texts.values())))
    if positions > bench.base.max_positions:
        raise ConfigError(
            f"window: {positions} positions with those of the adapter, "
            f"the model has {bench.base.max_positions}"
        )
    ref = bench.ref(name, program, merged=merged)
    runner = bench.runner(program, ref, positions)

    def losses(ids: Sequence[int], adapter: AdapterRef | None) -> Tensor:
        return token_losses(
            runner, ids, adapter, length=window, stride=stride, block_tokens=BLOCK_TOKENS
        )

    scores = []
    for path, ids in texts.items():
        base, adapted = losses(ids, None), losses(ids, ref)
        scores.append(TextScore(str(path), len(base), _perplexity(base), _perplexity(adapted)))
    return scores


def _perplexity(losses: Tensor) -> float:
    """e to the mean of nats."""
    return math.exp(float(losses.double().mean()))
