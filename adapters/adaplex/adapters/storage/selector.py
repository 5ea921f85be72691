"""Selector: how a request names an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adaplex.adapters.digest import PATTERN as DIGEST

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
LATEST = "latest"
"""Alias of the newest version. It cannot be set."""
DEFAULT = "default"
"""Alias that a bare name follows where it is set. Elsewhere a bare name is the newest version."""

_SELECTOR = re.compile(
    rf"(?P<name>{NAME.pattern})(@((?P<version>[1-9][0-9]{{0,17}})|(?P<alias>{ALIAS.pattern})))?"
)


@dataclass(frozen=True)
class Selector:
    """The parts of `name`, `name@version`, `name@alias` or `sha256:<hex>`."""

    name: str = ""
    version: int = 0
    """0 if not given."""
    alias: str = ""
    """Empty if not given."""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Selector | None:
        """Returns the parts of a selector, None for an invalid one."""
        if DIGEST.fullmatch(text):
            return cls(digest=text)
        match = _SELECTOR.fullmatch(text)
        if match is None:
            return None
        return cls(match["name"], int(match["version"] or 0), match["alias"] or "")
