"""`adaplex bench`: send load to a running server and report how it performs."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from adaplex.client.bench.churn import ChurnPlan, run_churn
from adaplex.client.bench.cliff import CliffPlan, run_cliff
from adaplex.client.bench.hot_tenant import HotTenantPlan, run_hot_tenant
from adaplex.client.bench.plot import check_plotting, draw
from adaplex.client.bench.progress import ProgressReporter
from adaplex.client.bench.punica import PunicaPlan, run_punica
from adaplex.client.bench.report import COLUMNS, SWAP_COLUMNS, Report
from adaplex.client.bench.session import BenchConfig, BenchRun, Session, open_session
from adaplex.client.bench.slora import SLoraPlan, run_slora
from adaplex.client.bench.workload import MIXES, Trace
from adaplex.client.cli import render
from adaplex.client.cli.app import Target
from adaplex.client.cli.commands import COMMANDS
from adaplex.client.cli.values import length_range, numbers

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help=COMMANDS["bench"],
)

Plan = TypeVar("Plan")
Prompt = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
Output = Annotated[int, typer.Option(min=1, help="Tokens of an answer.")]
Streams = Annotated[int, typer.Option(min=1, help="Concurrent requests.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Seconds of one run.")]


@dataclass(frozen=True)
class CommonOptions:
    """The options that all workloads share."""

    make_adapters: Annotated[
        int,
        typer.Option(
            min=0, help="Upload this many random adapters instead of using those on the server."
        ),
    ] = 0
    rank: Annotated[
        str, typer.Option(help="Ranks of the random adapters, in turn, such as 64,32,16,8.")
    ] = "16"
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Leave the random adapters on the server.")
    ] = False
    metrics: Annotated[
        str | None, typer.Option(help="URL of the server's metrics.  [default: its port 9400]")
    ] = None
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GB/s of the server's memory; measured if the server is on this CPU."
        ),
    ] = None
    first_token_bound: Annotated[
        float, typer.Option(min=0.0, help="Seconds to the first token that attainment allows.")
    ] = 6.0
    seed: Annotated[int, typer.Option(min=0, help="The same seed sends the same requests.")] = 42
    json: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the report to this file.")
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Plot the report to this file: .svg, .png or .pdf."),
    ] = None

    def config(self, target: str) -> BenchConfig:
        """Returns the configuration of a session with the server `target`."""
        return BenchConfig(
            target=target,
            make_adapters=self.make_adapters,
            ranks=numbers(self.rank),
            keep_adapters=self.keep_adapters,
            metrics=self.metrics,
            bandwidth=None if self.bandwidth is None else self.bandwidth * 1e9,
            first_token_bound=self.first_token_bound,
            seed=self.seed,
        )


def workload_command(
    run: Callable[[Session, Plan], Awaitable[Sequence[BenchRun]]],
) -> Callable[[Callable[..., Plan]], Callable[..., None]]:
    """Decorates a function from options to a plan: makes it a command that also has the common
    options, runs the plan and prints the report.
    """

    def command_of(plan_of: Callable[..., Plan]) -> Callable[..., None]:
        own = inspect.signature(plan_of, eval_str=True).parameters
        shared = inspect.signature(CommonOptions, eval_str=True).parameters

        def command(context: typer.Context, **given: Any) -> None:
            common = CommonOptions(**{name: given[name] for name in shared})
            plan = plan_of(**{name: given[name] for name in own})
            _measure(context, common, given, lambda session: run(session, plan))

        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        parameters = [context, *own.values(), *shared.values()]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = plan_of.__name__, plan_of.__doc__
        return command

    return command_of


@app.command()
@workload_command(run_punica)
def punica(
    streams: Annotated[str, typer.Option(help="Numbers of concurrent requests.")] = "1,8,16,32",
    mixes: Annotated[str, typer.Option(help=f"Popularities, of {', '.join(MIXES)}.")] = ",".join(
        MIXES
    ),
    prompt: Prompt = 64,
    output: Output = 64,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each stream.")] = 2,
) -> PunicaPlan:
    """Streams of back-to-back requests, over popularities of adapters."""
    chosen = tuple(mixes.split(","))
    if unknown := set(chosen) - set(MIXES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(MIXES)}")
    return PunicaPlan(numbers(streams), chosen, prompt, output, requests)


@app.command()
@workload_command(run_slora)
def slora(
    adapters: Annotated[int, typer.Option(min=0, help="Adapters to use; 0 is all.")] = 0,
    alpha: Annotated[
        float, typer.Option(min=0.001, help="Popularity: 1 is uniform, less is more skewed.")
    ] = 1.0,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second.")] = 2.0,
    cv: Annotated[
        float,
        typer.Option(min=0.0, help="Variation of the gaps: 0 periodic, 1 Poisson, more bursty."),
    ] = 1.0,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of requests.")] = 120.0,
    inputs: Annotated[
        str, typer.Option(help="Tokens of prompts as low:high, without high.")
    ] = "8:512",
    outputs: Annotated[
        str, typer.Option(help="Tokens of answers as low:high, without high.")
    ] = "8:512",
) -> SLoraPlan:
    """Requests at random times, over adapters by a power law: S-LoRA's generator."""
    trace = Trace(alpha, rate, cv, duration, length_range(inputs), length_range(outputs))
    return SLoraPlan(trace, adapters)


@app.command()
@workload_command(run_churn)
def churn(
    streams: Streams = 8,
    adapters: Annotated[
        int, typer.Option(min=1, help="Adapters to upload for this run; deleted at its end.")
    ] = 4,
    adapter_rank: Annotated[int, typer.Option(min=1, help="Rank of these adapters.")] = 16,
    prompt: Prompt = 64,
    output: Output = 64,
    seconds: Seconds = 20.0,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds between rounds of changes.")] = 0.0,
) -> ChurnPlan:
    """Uploads, replacements, unloads and deletions under load, compared with none."""
    return ChurnPlan(streams, adapters, adapter_rank, prompt, output, seconds, pause)


@app.command()
@workload_command(run_cliff)
def cliff(
    times: Annotated[str, typer.Option(help="Sizes of the working sets, in arenas.")] = "0.5,1,2,4",
    streams: Streams = 8,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests of one run, of all streams.")
    ] = 200,
    prompt: Prompt = 16,
    output: Output = 16,
) -> CliffPlan:
    """Working sets of adapters smaller and larger than the arena, uniform and zipf."""
    return CliffPlan(
        times=numbers(times, float),
        streams=streams,
        requests=requests,
        prompt=prompt,
        output=output,
    )


@app.command("hot-tenant")
@workload_command(run_hot_tenant)
def hot_tenant(
    tenants: Annotated[
        int, typer.Option(min=1, help="Number of cold tenants, with an adapter each.")
    ] = 4,
    rate: Annotated[
        float, typer.Option(min=0.001, help="Requests a second of the cold tenants, in all.")
    ] = 2.0,
    flood: Annotated[int, typer.Option(min=1, help="Streams of the hot tenant.")] = 16,
    prompt: Prompt = 64,
    output: Output = 32,
    seconds: Seconds = 20.0,
) -> HotTenantPlan:
    """The cost of one tenant's flood to tenants with other adapters."""
    return HotTenantPlan(tenants, rate, flood, prompt, output, seconds)


def print_report(report: Report) -> None:
    """Prints the tables on standard output and the warnings on standard error."""
    render.table(COLUMNS, report.rows())
    if swaps := report.swap_rows():
        typer.echo()
        render.table(SWAP_COLUMNS, swaps)
    render.warnings(report.warnings)


def _measure(
    context: typer.Context,
    common: CommonOptions,
    options: dict[str, Any],
    run: Callable[[Session], Awaitable[Sequence[BenchRun]]],
) -> None:
    target = context.find_object(Target)
    assert target is not None
    if common.plot:
        check_plotting()
    config = common.config(target.target)

    async def measured() -> Report:
        async with (
            target.async_client() as client,
            open_session(client, config, ProgressReporter()) as session,
        ):
            runs = await run(session)
            return Report.of(session, {"command": context.info_name, **_plain(options)}, runs)

    report = asyncio.run(measured())
    print_report(report)
    if common.json:
        common.json.write_text(report.json())
    if common.plot:
        draw(report.runs, common.plot)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options as values for JSON."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
