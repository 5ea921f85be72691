"""S-LoRA's workload: requests at their times, adapters by a power law."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaplex.client.bench.load import Load
from adaplex.client.bench.session import Run, Session
from adaplex.client.bench.workload import Trace
from adaplex.client.errors import InvalidArgument


@dataclass(frozen=True)
class SLora:
    """`adapters` 0 asks all there are."""

    trace: Trace = field(default_factory=Trace)
    adapters: int = 0


async def slora(session: Session, plan: SLora) -> list[Run]:
    """One run. Nothing is warmed: adapters come when they are first asked."""
    trace, longest = plan.trace, session.info.model.max_model_len
    if trace.inputs[1] + trace.outputs[1] - 2 > longest:
        raise InvalidArgument.because(
            "lengths",
            f"inputs below {trace.inputs[1]} and outputs below {trace.outputs[1]} tokens "
            f"do not fit the server's {longest}",
        )
    members = session.adapters.first(plan.adapters or max(1, len(session.adapters.members)))
    names = [member.name for member in members]
    asks = trace.asks(names, session.prompts, session.setup.seed)

    async def drive(load: Load) -> None:
        await load.open(asks)

    case = {"adapters": len(names), "rate": trace.rate, "alpha": trace.alpha, "cv": trace.cv}
    return [await session.observe("slora", case, drive, total=len(asks))]
