"""`adaplex bench`: make load on a running server, and say what became of it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from adaplex.client.bench import churn as churning
from adaplex.client.bench import cliff as cliffs
from adaplex.client.bench import hot_tenant as hot_tenants
from adaplex.client.bench import plot as plots
from adaplex.client.bench import punica as punicas
from adaplex.client.bench import slora as sloras
from adaplex.client.bench.progress import Progress
from adaplex.client.bench.report import COLUMNS, SWAP_COLUMNS, Report
from adaplex.client.bench.session import Run, Session, Setup, open_session
from adaplex.client.bench.workload import MIXES, Trace
from adaplex.client.cli import render
from adaplex.client.cli.app import Target
from adaplex.client.cli.values import length_range, numbers

app = typer.Typer(
    no_args_is_help=True,
    help="Make load on a running server and measure it. Prompts are random tokens, each new; "
    "answers are greedy and run to their full length.",
)

Plan = TypeVar("Plan")
Prompt = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
Output = Annotated[int, typer.Option(min=1, help="Tokens of an answer.")]
Streams = Annotated[int, typer.Option(min=1, help="Requests in work at once.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Seconds of one run.")]


@dataclass(frozen=True)
class Common:
    """The options that all workloads share."""

    make_adapters: Annotated[
        int,
        typer.Option(min=0, help="Upload so many random adapters instead of asking those there."),
    ] = 0
    rank: Annotated[str, typer.Option(help="Their ranks, in turn, such as 64,32,16,8.")] = "16"
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Leave them on the server.")
    ] = False
    metrics: Annotated[
        str | None, typer.Option(help="URL of the server's metrics.  [default: its port 9400]")
    ] = None
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GB/s of the memory the server computes from; measured if it is on this CPU.",
        ),
    ] = None
    first_token_bound: Annotated[
        float, typer.Option(min=0.0, help="Seconds; attainment counts what keeps it.")
    ] = 6.0
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same requests.")] = 42
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the report here.")] = None
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw it here: .svg, .png or .pdf.")
    ] = None

    def setup(self, target: str) -> Setup:
        """As the load generator takes it."""
        return Setup(
            target=target,
            make_adapters=self.make_adapters,
            ranks=numbers(self.rank),
            keep_adapters=self.keep_adapters,
            metrics=self.metrics,
            bandwidth=None if self.bandwidth is None else self.bandwidth * 1e9,
            first_token_bound=self.first_token_bound,
            seed=self.seed,
        )


def measuring(
    work: Callable[[Session, Plan], Awaitable[Sequence[Run]]],
) -> Callable[[Callable[..., Plan]], Callable[..., None]]:
    """Makes a command of a function from options to a plan: with Common's options, it does the
    work and tells the result.
    """

    def command_of(plan_of: Callable[..., Plan]) -> Callable[..., None]:
        own = inspect.signature(plan_of, eval_str=True).parameters
        shared = inspect.signature(Common, eval_str=True).parameters

        def command(context: typer.Context, **given: Any) -> None:
            common = Common(**{name: given[name] for name in shared})
            plan = plan_of(**{name: given[name] for name in own})
            _measure(context, common, given, lambda session: work(session, plan))

        where = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        everything = [where, *own.values(), *shared.values()]
        command.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = plan_of.__name__, plan_of.__doc__
        return command

    return command_of


@app.command()
@measuring(punicas.punica)
def punica(
    streams: Annotated[str, typer.Option(help="Requests in work at once.")] = "1,8,16,32",
    mixes: Annotated[str, typer.Option(help=f"Of {', '.join(MIXES)}.")] = ",".join(MIXES),
    prompt: Prompt = 64,
    output: Output = 64,
    requests: Annotated[int, typer.Option(min=1, help="Of each stream.")] = 2,
) -> punicas.Punica:
    """Streams that ask back to back, over popularities of adapters."""
    chosen = tuple(mixes.split(","))
    if unknown := set(chosen) - set(MIXES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(MIXES)}")
    return punicas.Punica(numbers(streams), chosen, prompt, output, requests)


@app.command()
@measuring(sloras.slora)
def slora(
    adapters: Annotated[int, typer.Option(min=0, help="How many to ask; 0 is all.")] = 0,
    alpha: Annotated[
        float, typer.Option(min=0.001, help="1 asks all alike, less asks few of them often.")
    ] = 1.0,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second.")] = 2.0,
    cv: Annotated[float, typer.Option(min=0.0, help="Of the gaps; more comes in bursts.")] = 1.0,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of requests.")] = 120.0,
    inputs: Annotated[str, typer.Option(help="Tokens of prompts, low:high, high left out.")] = (
        "8:512"
    ),
    outputs: Annotated[str, typer.Option(help="Tokens of answers, the same way.")] = "8:512",
) -> sloras.SLora:
    """Requests at their times, adapters by a power law: S-LoRA's generator."""
    trace = Trace(alpha, rate, cv, duration, length_range(inputs), length_range(outputs))
    return sloras.SLora(trace, adapters)


@app.command()
@measuring(churning.churn)
def churn(
    streams: Streams = 8,
    adapters: Annotated[int, typer.Option(min=1, help="Made for this, and deleted.")] = 4,
    adapter_rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 16,
    prompt: Prompt = 64,
    output: Output = 64,
    seconds: Seconds = 20.0,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds between rounds of changes.")] = 0.0,
) -> churning.Churn:
    """Uploads, replacements, unloads and deletions under load, against the same without."""
    return churning.Churn(streams, adapters, adapter_rank, prompt, output, seconds, pause)


@app.command()
@measuring(cliffs.cliff)
def cliff(
    times: Annotated[str, typer.Option(help="Working sets, in arenas.")] = "0.5,1,2,4",
    streams: Streams = 8,
    requests: Annotated[int, typer.Option(min=1, help="Of all streams, in one run.")] = 200,
    prompt: Prompt = 16,
    output: Output = 16,
) -> cliffs.Cliff:
    """Working sets of adapters smaller and larger than the arena, uniform and zipf."""
    return cliffs.Cliff(
        times=numbers(times, float),
        streams=streams,
        requests=requests,
        prompt=prompt,
        output=output,
    )


@app.command("hot-tenant")
@measuring(hot_tenants.hot_tenant)
def hot_tenant(
    tenants: Annotated[int, typer.Option(min=1, help="Cold ones, an adapter each.")] = 4,
    rate: Annotated[float, typer.Option(min=0.001, help="Their requests a second, in all.")] = 2.0,
    flood: Annotated[int, typer.Option(min=1, help="Streams of the hot one.")] = 16,
    prompt: Prompt = 64,
    output: Output = 32,
    seconds: Seconds = 20.0,
) -> hot_tenants.HotTenant:
    """What one tenant's flood costs those who ask for other adapters."""
    return hot_tenants.HotTenant(tenants, rate, flood, prompt, output, seconds)


def tell(report: Report) -> None:
    """Prints tables on standard output, and what is missing on standard error."""
    render.table(COLUMNS, report.rows())
    if swaps := report.swap_rows():
        typer.echo()
        render.table(SWAP_COLUMNS, swaps)
    render.warnings(report.warnings)


def _measure(
    context: typer.Context,
    common: Common,
    options: dict[str, Any],
    work: Callable[[Session], Awaitable[Sequence[Run]]],
) -> None:
    target = context.find_object(Target)
    assert target is not None
    if common.plot:
        plots.check_plotting()
    setup = common.setup(target.target)

    async def run() -> Report:
        async with (
            target.async_client() as client,
            open_session(client, setup, Progress()) as session,
        ):
            runs = await work(session)
            return Report.of(session, {"command": context.info_name, **_plain(options)}, runs)

    report = asyncio.run(run())
    tell(report)
    if common.json:
        common.json.write_text(report.json())
    if common.plot:
        plots.draw(report.runs, common.plot)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
