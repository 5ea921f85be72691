"""Response: turns the engine's outputs for one request into protobuf messages.

The end of a request is decided in two places. The engine ends it at a stop token, an
end-of-sequence token, `max_tokens` or the context length. A stop string is found here, as only the
edge knows text: the generator then aborts the request in the engine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adaplex.adapters.api import Lease
from adaplex.engine.request import FinishReason, Logprob, Request, StepOutput, Timing
from adaplex.server import generation_messages as messages
from adaplex.server.stop_strings import NO_SPECIAL, StopStrings
from adaplex.server.text import Detokenizer, Tokenizer
from adaplex.v1.generation_pb2 import GenerationDelta, GenerationFinished, GenerationStarted


class Response:
    """Text, tokens and timing of one response so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        stops: Sequence[str],
        *,
        special: Mapping[int, str] = NO_SPECIAL,
        warnings: Sequence[str] = (),
        lease: Lease | None = None,
        fetch_seconds: float = 0.0,
    ) -> None:
        """`special` has the spelling of each special token, by id; `warnings` are those of the
        prompt. `fetch_seconds` is the time to resolve or fetch the adapter, before the engine got
        the request.
        """
        self._warnings = warnings
        self._request, self._lease, self._fetch_seconds = request, lease, fetch_seconds
        self._text = Detokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(stops, special)
        self._finish: FinishReason | None = None
        self._stop_token: int | None = None
        self._timing = Timing()
        """Latest timing from the engine; it lacks the end if a stop string ended the request."""
        self._first_token: float | None = None
        self._last_token: float | None = None
        self.tokens = 0
        """Tokens so far."""
        self.gaps: list[float] = []
        """Seconds between consecutive steps with tokens, of the last `add`."""

    @property
    def ended(self) -> bool:
        """True once the engine or a stop string has ended the response."""
        return self._finish is not None

    @property
    def finish(self) -> FinishReason:
        """Reason of the end: STOP also for a stop string."""
        assert self._finish is not None
        return self._finish

    def started(self, output: StepOutput, request_id: str, model: str) -> GenerationStarted:
        """Returns the first message, which proves what is applied."""
        ref, lease = output.adapter, self._lease
        return GenerationStarted(
            request_id=request_id,
            model=model,
            adapter=messages.applied(ref, lease) if ref and lease else None,
            prompt_tokens=len(self._request.prompt),
            warnings=self._warnings,
        )

    def add(self, outputs: Sequence[StepOutput]) -> GenerationDelta | None:
        """Adds the outputs of steps, up to the end of the response. Returns what they add to it,
        None if that is nothing. Sets `ended` at the engine's end and at a stop string.
        """
        text, self.gaps = "", []
        tokens: list[int] = []
        logprobs: list[Logprob] = []
        for output in outputs:
            text += self._add(output)
            tokens += output.tokens
            logprobs += output.logprobs
            if self.ended:
                break
        if not text and not tokens:
            return None
        entries = [messages.token_logprob(logprob) for logprob in logprobs]
        return GenerationDelta(text=text, token_ids=tokens, logprobs=entries)

    def finished(self) -> GenerationFinished:
        """Returns the last message."""
        timing = self.timing()
        return GenerationFinished(
            reason=messages.FINISH[self.finish],
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
        """Returns the engine's timing; its end is measured here if a stop string was found."""
        wait = self._timing.adapter_wait + self._fetch_seconds
        timing = replace(self._timing, adapter_wait=wait)
        if self._stops.found is None:
            return timing
        now, arrival = time.monotonic(), self._request.arrival
        first = (self._first_token or now) - arrival
        return replace(timing, first_token=first, total=now - arrival)

    def _add(self, output: StepOutput) -> str:
        """Adds one step. Returns the text that can be sent; sets the finish reason at the end."""
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
        """Counts the tokens of a step. Returns the text that can be sent."""
        if not output.tokens:
            return ""
        if self._last_token is not None:
            self.gaps.append(output.at - self._last_token)
        self._last_token = output.at
        self._first_token = self._first_token or output.at
        self.tokens += len(output.tokens)
        tokens = output.tokens
        if output.finish is FinishReason.STOP:
            self._stop_token = tokens[-1]
            if self._stop_token not in self._stops.marks:  # it is no text
                tokens = tokens[:-1]
        return self._match_all(tokens)

    def _match_all(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens that can be sent, up to a stop string."""
        marks, text, begin = self._stops.marks, "", 0
        for at, token in enumerate(tokens):
            if token in marks and self._stops.found is None:
                text += self._match(self._text.push(tokens[begin:at])) if at > begin else ""
                text += self._match(marks[token]) if self._stops.found is None else ""
                begin = at + 1
        if begin < len(tokens) and self._stops.found is None:
            text += self._match(self._text.push(tokens[begin:]))
        return text

    def _match(self, text: str) -> str:
        """Returns the text that no stop string can contain; up to `min_tokens`, none matches."""
        return self._stops.push(text, matching=self.tokens > self._request.sampling.min_tokens)

    def _stop(self) -> str:
        """Returns the stop string, or the stop token as decimal digits, or nothing."""
        if self._stops.found is not None:
            return self._stops.found
        return "" if self._stop_token is None else str(self._stop_token)
