"""Errors of the edge itself.

AdaplexError            (adaplex.adapters.errors)
└── RequestError        (adaplex.engine.errors)
    ├── UploadsBusy     too many uploads at once; has the delay to try again
    ├── UploadIdle      the client of an upload stopped sending
    ├── Unauthenticated no valid credential
    ├── ScopeMissing    the principal may not do that
    ├── AuthenticationBusy  too many tokens are being checked; has the delay to try again
    └── RequestInvalid
        └── NoChatTemplate  a chat is sent to a model that has no chat template
ConfigError             the settings cannot be served; ends the start
"""

from __future__ import annotations

from adaplex.engine.errors import RequestError, RequestInvalid


class UploadsBusy(RequestError):
    """As many uploads, loads and merges as allowed are running."""

    def __init__(self, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{limit} uploads run, the limit; try again in {retry_after:.1f} s")
        self.retry_after = retry_after
        """Seconds."""


class UploadIdle(RequestError):
    """The client of an upload sent nothing for too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"upload: nothing received for {seconds:g} s; send chunks without pauses")


class Unauthenticated(RequestError):
    """The call shows no credential, or none that is valid."""


class ScopeMissing(RequestError):
    """The principal lacks the scope that the call needs."""


class AuthenticationBusy(RequestError):
    """As many tokens as allowed wait to be checked for the first time."""

    def __init__(self, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{limit} tokens are being checked, the limit; try again")
        self.retry_after = retry_after
        """Seconds."""


class NoChatTemplate(RequestInvalid):
    """A conversation cannot be encoded: the model has no chat template."""

    def __init__(self) -> None:
        super().__init__("spec.chat", "this model has no chat template; send text")


class ConfigError(Exception):
    """The configuration cannot be served. Names every setting at fault, its value and its limit."""
