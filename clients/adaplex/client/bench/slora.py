"""S-LoRA's workload: requests at random times, over adapters by a power law."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaplex.client.bench.load import LoadGenerator
from adaplex.client.bench.session import BenchRun, Session
from adaplex.client.bench.workload import Trace
from adaplex.client.errors import InvalidArgument


@dataclass(frozen=True)
class SLoraPlan:
    """A trace over the first `adapters` adapters of the server; 0 is all of them."""

    trace: Trace = field(default_factory=Trace)
    adapters: int = 0


async def run_slora(session: Session, plan: SLoraPlan) -> list[BenchRun]:
    """Measures one run without a warm-up: adapters are loaded by their first requests.

    Raises InvalidArgument if a prompt and its answer can exceed the server's context.
    """
    trace, longest = plan.trace, session.info.model.max_model_len
    if trace.inputs[1] + trace.outputs[1] - 2 > longest:
        raise InvalidArgument.because(
            "lengths",
            f"inputs below {trace.inputs[1]} and outputs below {trace.outputs[1]} tokens "
            f"do not fit the server's max_model_len {longest}",
        )
    adapters = session.pool.first(plan.adapters or max(1, len(session.pool.adapters)))
    names = [adapter.name for adapter in adapters]
    requests = trace.requests(names, session.prompts, session.config.seed)

    async def drive(load: LoadGenerator) -> None:
        await load.run_open(requests)

    case = {"adapters": len(names), "rate": trace.rate, "alpha": trace.alpha, "cv": trace.cv}
    return [await session.observe("slora", case, drive, total=len(requests))]
