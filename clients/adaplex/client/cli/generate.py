"""`adaplex generate`: generate text and stream it to the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from adaplex.client.cli import render
from adaplex.client.cli.app import connect
from adaplex.client.cli.values import weighted_selector
from adaplex.client.client import Client, GenerationStream
from adaplex.client.errors import InvalidArgument
from adaplex.client.generation_types import (
    AdapterMode,
    ChatMessage,
    GenerateOptions,
    Generation,
    Prompt,
    SamplingParams,
)

NO_TEMPLATE = "CHAT_TEMPLATE_MISSING"
"""Reason of the server's error for a chat to a model without a chat template."""


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt; by default standard input.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="name, name@version, name@alias or sha256:<hex>; by default the base model. "
            "Repeat as name:weight to mix several.",
        ),
    ] = None,
    routing_key: Annotated[
        str, typer.Option(help="Requests of one key get one version of a weighted alias.")
    ] = "",
    mode: Annotated[AdapterMode | None, typer.Option(help="How the adapter is applied.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Apply the model's chat template, or send text; by default a model without a "
            "template gets text.",
        ),
    ] = None,
    add_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="With --raw: whether the tokenizer adds BOS and the like; by default unless the "
            "text starts with them.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Greatest length of the answer.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from this many tokens; 0 is all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from tokens of this total probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Drop tokens below this times the likeliest."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, help="Show this many likeliest tokens a token.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result.")] = False,
) -> None:
    """Generate text and stream it to the terminal; the applied adapter goes to standard error."""
    text = _read_prompt(prompt)
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
    single, several = _adapter_options(adapter or [])

    def ask(client: Client, message: Prompt) -> Generation:
        options = GenerateOptions(
            adapter=single,
            adapters=several,
            mode=mode,
            sampling=sampling,
            routing_key=routing_key,
            add_special_tokens=add_special_tokens,
        )
        with client.stream(message, **options) as stream:
            return _read(stream, shown=not as_json)

    with connect(context) as client:
        try:
            answer = ask(client, text if chat is False else [ChatMessage("user", text)])
        except InvalidArgument as error:
            if chat is not None or error.reason != NO_TEMPLATE:
                raise
            typer.echo("this model has no chat template: the prompt is sent as text", err=True)
            answer = ask(client, text)
    if as_json:
        typer.echo(render.json_text(answer))
    elif answer.logprobs:
        render.logprobs(answer.logprobs)
    typer.echo(render.proof(answer), err=True)
    render.warnings(answer.warnings)
    if answer.adapter:
        render.warnings(answer.adapter.warnings)


def _read(stream: GenerationStream, shown: bool) -> Generation:
    """Reads a stream to its end and prints its text; ends the line even after an error."""
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


def _adapter_options(adapters: list[str]) -> tuple[str | None, list[tuple[str, float]] | None]:
    """Returns the options `adapter` and `adapters` of a generation; one of them is None."""
    weighted = [weighted_selector(text) for text in adapters]
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0], None
    return None, weighted or None


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise typer.BadParameter("give a prompt, as an argument or on standard input")
    return prompt
