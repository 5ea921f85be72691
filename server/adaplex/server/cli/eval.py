"""`adaplex adapters eval`: perplexities of texts under the base and under an adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaplex.client.cli import render
from adaplex.client.cli.arguments import AsJson
from adaplex.server.cli.store import ConfigFile, SharedStore, StoreDir
from adaplex.server.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from adaplex.adapters.api import AdapterProgram
    from adaplex.engine.request import AdapterRef
    from adaplex.server.offline_base import OfflineBase

Adapter = Annotated[
    str,
    typer.Argument(
        help="Adapter directory, or a stored adapter: name, name@version, name@alias or digest."
    ),
]
Files = Annotated[
    list[Path],
    typer.Option("--file", exists=True, dir_okay=False, help="Text file in UTF-8; repeatable."),
]
Model = Annotated[str | None, typer.Option(help="Base model, as for `adaplex serve`.")]
Quantization = Annotated[str | None, typer.Option(help="Weight format of the base.")]
CpuActivations = Annotated[
    str | None,
    typer.Option(help="As for `adaplex serve`; int8 is measured beside float, which is exact."),
]


@dataclass(frozen=True)
class TextScore:
    """Perplexities of one text."""

    file: str
    tokens: int
    """Scored tokens: each has at least one token before it in its window."""
    base: float
    adapter: float
    base_in_float: float | None = None
    """`base` with activations in float; None unless they were rounded to 8 bits."""
    adapter_in_float: float | None = None

    @property
    def ratio(self) -> float:
        """Adapter / base: below 1, the adapter predicts the text better than the base does."""
        return self.adapter / self.base


def evaluate(
    adapter: Adapter,
    file: Files,
    window: Annotated[int, typer.Option(min=2, help="Tokens of one window.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from one window to the next; by default half a window."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens to score from the beginning of each text.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Evaluate merged mode.")] = False,
    model: Model = None,
    quantization: Quantization = None,
    cpu_activations: CpuActivations = None,
    store_dir: StoreDir = None,
    shared_store: SharedStore = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of texts by the base and by an adapter, without a server."""
    from adaplex.server.offline_base import OfflineBase, errors_as_messages  # imports torch

    with errors_as_messages():
        texts = {path: path.read_text(encoding="utf-8") for path in file}
        directory = _directory(adapter)
        flags = {
            "model": model,
            "quantization": quantization,
            "cpu_activations": cpu_activations,
            "config": config,
            "store_dir": store_dir,
            "shared_store": shared_store,
        }
        offline = OfflineBase.of(flags)
        if directory is None:
            name, program = offline.stored(adapter)
        else:
            name, program = directory.name, offline.read(directory)
        ids = {path: _tokens(offline, path, text, max_tokens) for path, text in texts.items()}
        step = min(stride or max(window // 2, 1), window)
        scores = _scores(offline, name, program, ids, window, step, merged=merged)
        rounded = offline.config.cpu_activations == "int8"
        if rounded:
            exact = OfflineBase.of(flags | {"cpu_activations": "float"})
            in_float = _scores(exact, name, program, ids, window, step, merged=merged)
            scores = [
                replace(score, base_in_float=same.base, adapter_in_float=same.adapter)
                for score, same in zip(scores, in_float, strict=True)
            ]
    render.warnings(program.warnings)
    if as_json:
        document = {
            "model": offline.base.spec.name,
            "quantization": offline.base.quantization,
            "cpu_activations": offline.config.cpu_activations,
            "adapter": {"name": name, "family": program.family, "digest": program.digest},
            "texts": [asdict(score) | {"ratio": score.ratio} for score in scores],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    head = ["TEXT", "TOKENS", "BASE", "ADAPTER", "ADAPTER / BASE"]
    if rounded:
        head += ["BASE IN FLOAT", "ADAPTER IN FLOAT"]
    render.table(head, [_line(score) for score in scores])


def _line(score: TextScore) -> tuple[object, ...]:
    """Returns the columns of one text; in float only where activations were rounded."""
    found = (score.base, score.adapter, score.ratio, score.base_in_float, score.adapter_in_float)
    return (score.file, score.tokens, *(f"{each:.3f}" for each in found if each is not None))


def _directory(adapter: str) -> Path | None:
    """Returns the directory, None for a selector. Raises ConfigError if it is neither."""
    from adaplex.adapters.api import Selector

    if Path(adapter).is_dir():
        return Path(adapter)
    if Selector.parse(adapter) is None:
        raise ConfigError(f"{adapter}: there is no such directory, and no adapter has such a name")
    return None


def _tokens(offline: OfflineBase, path: Path, text: str, limit: int | None) -> tuple[int, ...]:
    """Returns the first `limit` token ids of a text. Raises ConfigError for fewer than two."""
    from adaplex.server.encoded_prompt import encode_text

    ids = encode_text(offline.base.tokenizer, text).token_ids[:limit]
    if len(ids) < 2:
        raise ConfigError(f"{path}: has {len(ids)} tokens, at least 2 are needed")
    return ids


def _scores(
    offline: OfflineBase,
    name: str,
    program: AdapterProgram,
    texts: dict[Path, tuple[int, ...]],
    window: int,
    stride: int,
    *,
    merged: bool,
) -> list[TextScore]:
    """Scores every text under the base and under the adapter. Raises ConfigError."""
    from adaplex.model.constants import KV_BLOCK_TOKENS
    from adaplex.model.perplexity import token_losses

    positions = program.traits.leading + min(window, max(map(len, texts.values())))
    if positions > offline.base.max_positions:
        raise ConfigError(
            f"window: {positions} positions, those of the adapter included, exceed the model's "
            f"{offline.base.max_positions}"
        )
    ref = offline.ref(name, program, merged=merged)
    runner = offline.runner(program, ref, positions)

    def losses(ids: Sequence[int], adapter: AdapterRef | None) -> Tensor:
        return token_losses(
            runner, ids, adapter, length=window, stride=stride, block_tokens=KV_BLOCK_TOKENS
        )

    scores = []
    for path, ids in texts.items():
        base, adapted = losses(ids, None), losses(ids, ref)
        scores.append(TextScore(str(path), len(base), _perplexity(base), _perplexity(adapted)))
    return scores


def _perplexity(losses: Tensor) -> float:
    """Returns the perplexity: e to the mean loss in nats."""
    return math.exp(float(losses.double().mean()))
