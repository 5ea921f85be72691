"""Selector: how a request names an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adaplex.adapters.digest import PATTERN as DIGEST

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
LATEST = "latest"
"""The alias of the newest version; nobody can set it."""
DEFAULT = "default"
"""The alias that a bare name follows, where it is set; elsewhere a bare name is the newest."""

_SELECTOR = re.compile(
    rf"(?P<name>{NAME.pattern})(@((?P<version>[1-9][0-9]{{0,17}})|(?P<alias>{ALIAS.pattern})))?"
)


@dataclass(frozen=True)
class Selector:
    """`name`, `name@version`, `name@alias` or `sha256:<hex>`, taken apart."""

    name: str = ""
    version: int = 0
    """0 when it is not given."""
    alias: str = ""
    """Empty for a bare name."""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Selector | None:
        """The parts of a selector; None when it cannot be one."""
        if DIGEST.fullmatch(text):
            return cls(digest=text)
        match = _SELECTOR.fullmatch(text)
        if match is None:
            return None
        return cls(match["name"], int(match["version"] or 0), match["alias"] or "")
