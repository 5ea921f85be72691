"""Response: one request's way from engine outputs to messages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from adaplex.adapters.storage.lease import Lease
from adaplex.engine.request import FinishReason, Logprob, Request, StepOutput, Timing
from adaplex.server import convert
from adaplex.server.text import Detokenizer, StopStrings, Tokenizer
from adaplex.v1.generation_pb2 import GenerationDelta, GenerationFinished, GenerationStarted


class Response:
    """Text, tokens and timing of one answer as they come."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        stops: Sequence[str],
        *,
        lease: Lease | None = None,
        fetch_seconds: float = 0.0,
    ) -> None:
        """`fetch_seconds` is what bringing the adapter to this machine took before the engine knew
        of the request.
        """
        self._request, self._lease, self._fetch_seconds = request, lease, fetch_seconds
        self._text = Detokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(stops)
        self._finish: FinishReason | None = None
        self._stop_token: int | None = None
        self._timing = Timing()
        """What the engine said last; a stop string ends the answer before the engine does."""
        self._first_token: float | None = None
        self._last_token: float | None = None
        self.tokens = 0
        """Tokens so far."""
        self.gaps: list[float] = []
        """Seconds before each step with tokens of the last `take`, but the answer's first."""

    @property
    def ended(self) -> bool:
        """Whether no more tokens are wanted."""
        return self._finish is not None

    @property
    def finish(self) -> FinishReason:
        """Why the answer ended."""
        assert self._finish is not None
        return self._finish

    def started(self, output: StepOutput, request_id: str, model: str) -> GenerationStarted:
        """The first message: what is applied."""
        ref, lease = output.adapter, self._lease
        return GenerationStarted(
            request_id=request_id,
            model=model,
            adapter=convert.applied(ref, lease) if ref and lease else None,
            prompt_tokens=len(self._request.prompt),
        )

    def take(self, outputs: Sequence[StepOutput]) -> GenerationDelta | None:
        """What steps add together, up to the end of the answer; None when that is nothing."""
        text, self.gaps = "", []
        tokens: list[int] = []
        logprobs: list[Logprob] = []
        for output in outputs:
            text += self._take(output)
            tokens += output.tokens
            logprobs += output.logprobs
            if self.ended:
                break
        if not text and not tokens:
            return None
        entries = [convert.token_logprob(logprob) for logprob in logprobs]
        return GenerationDelta(text=text, token_ids=tokens, logprobs=entries)

    def finished(self) -> GenerationFinished:
        """The last message."""
        timing = self.timing()
        return GenerationFinished(
            reason=convert.FINISH[self.finish],
            stop=self._stop(),
            prompt_tokens=len(self._request.prompt),
            completion_tokens=self.tokens,
            cached_tokens=timing.cached_tokens,
            queue_seconds=timing.queued,
            adapter_wait_seconds=timing.adapter_wait,
            first_token_seconds=timing.first_token,
            total_seconds=timing.total,
        )

    def timing(self) -> Timing:
        """The engine's figures, with ours where a stop string kept it from saying them."""
        wait = self._timing.adapter_wait + self._fetch_seconds
        timing = replace(self._timing, adapter_wait=wait)
        if self._stops.found is None:
            return timing
        now, arrival = time.monotonic(), self._request.arrival
        first = (self._first_token or now) - arrival
        return replace(timing, first_token=first, total=now - arrival)

    def _take(self, output: StepOutput) -> str:
        """The text that one step makes certain; the answer may end with it."""
        self._timing = output.timing or self._timing
        text = self._push(output)
        if output.finish is not None and self._stops.found is None:
            self._finish = output.finish
            cut = output.finish is FinishReason.LENGTH
            text += self._match(self._text.flush(cut=cut))
        if self._stops.found is not None:
            self._finish = FinishReason.STOP
        elif self.ended:
            text += self._stops.flush()
        return text

    def _push(self, output: StepOutput) -> str:
        """Counts the tokens of a step and returns the text that they make certain."""
        if not output.tokens:
            return ""
        if self._last_token is not None:
            self.gaps.append(output.at - self._last_token)
        self._last_token = output.at
        self._first_token = self._first_token or output.at
        self.tokens += len(output.tokens)
        shown = output.tokens
        if output.finish is FinishReason.STOP:
            self._stop_token, shown = shown[-1], shown[:-1]
        return self._match(self._text.push(shown))

    def _match(self, text: str) -> str:
        """What is certain to come before any stop string; none counts up to `min_tokens`."""
        return self._stops.push(text, looking=self.tokens > self._request.sampling.min_tokens)

    def _stop(self) -> str:
        """The stop string or token that ended the answer."""
        if self._stops.found is not None:
            return self._stops.found
        return "" if self._stop_token is None else str(self._stop_token)
