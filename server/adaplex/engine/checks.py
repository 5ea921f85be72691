"""Checks of a request by itself, before the engine knows it."""

from __future__ import annotations

from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import RequestInvalid
from adaplex.engine.request import Request

SHOWN_TOKENS = 16
"""Of an invocation, in an error."""


def check_request(request: Request, config: EngineConfig) -> None:
    """Raises RequestInvalid for a request that this engine can never serve."""
    tokens, leading, adapter = len(request.prompt), request.leading, request.adapter
    if not tokens:
        raise RequestInvalid("prompt", "is empty")
    if leading + tokens >= config.max_model_len:
        before = f" behind the {leading} of adapter {adapter.name}" if adapter and leading else ""
        reason = f"has {tokens} tokens{before}; with one to generate, the limit is "
        raise RequestInvalid("prompt", f"{reason}{config.max_model_len}")
    if adapter and request.invoked_at is None:
        shown = ", ".join(map(str, adapter.invocation[:SHOWN_TOKENS]))
        more = ", ..." if len(adapter.invocation) > SHOWN_TOKENS else ""
        reason = f"does not have the tokens {shown}{more}, which adapter {adapter.name} begins at"
        raise RequestInvalid("prompt", reason)
    if request.sampling.max_tokens < 1:
        raise RequestInvalid("max_tokens", "must be at least 1")
