"""`adaplex generate`: ask, and watch the answer arrive."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from adaplex.client.cli import render
from adaplex.client.cli.app import connect
from adaplex.client.cli.values import weighted_selector
from adaplex.client.client import GenerationStream
from adaplex.client.generation_types import (
    AdapterMode,
    ChatMessage,
    Generation,
    Prompt,
    SamplingParams,
)


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; read from standard input when absent.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="name, name@version, name@alias or sha256:<hex>; else the base. "
            "Repeat as name:weight to combine several.",
        ),
    ] = None,
    routing_key: Annotated[str, typer.Option(help="Same key, same side of a weighted alias.")] = "",
    mode: Annotated[AdapterMode | None, typer.Option(help="How the adapter is applied.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Use the model's chat template, or do not.")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Greatest length.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 keeps the vocabulary.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, help="Show this many likeliest tokens.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result.")] = False,
) -> None:
    """Generate text and stream it to the terminal. What was applied goes to standard error."""
    asked = _asked(prompt)
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    single, several = _named(adapter or [])
    message: Prompt = [ChatMessage("user", asked)] if chat else asked
    with (
        connect(context) as client,
        client.stream(
            message,
            adapter=single,
            adapters=several,
            mode=mode,
            sampling=sampling,
            routing_key=routing_key,
        ) as stream,
    ):
        answer = _read(stream, shown=not as_json)
    if as_json:
        typer.echo(render.json_text(answer))
    elif answer.logprobs:
        render.logprobs(answer.logprobs)
    typer.echo(render.proof(answer), err=True)
    if answer.adapter:
        render.warnings(answer.adapter.warnings)


def _read(stream: GenerationStream, shown: bool) -> Generation:
    """Reads a stream to its end, showing its text; the line is closed whatever happens."""
    open_line = False
    try:
        for event in stream:
            if shown and event.text:
                render.text(event.text)
                open_line = not event.text.endswith("\n")
    finally:
        if open_line:
            typer.echo()
    return stream.generation


def _named(adapters: list[str]) -> tuple[str | None, list[tuple[str, float]] | None]:
    """One adapter as it is, or several with weights."""
    weighted = [weighted_selector(text) for text in adapters]
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0], None
    return None, weighted or None


def _asked(prompt: str | None) -> str:
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise typer.BadParameter("give a prompt, as an argument or on standard input")
    return prompt
