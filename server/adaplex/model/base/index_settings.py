"""IndexSettings: the package indexes that pip and uv would use on this machine.

Sources: the documentation of pip, "Configuration", and of uv, "Environment variables". Neither tool
is needed.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PUBLIC_INDEX = "https://pypi.org/simple"
"""Default of pip and uv."""


@dataclass(frozen=True)
class IndexSettings:
    """Where packages come from."""

    indexes: tuple[str, ...]
    """URLs of simple indexes, to be tried in this order."""
    folders: tuple[Path, ...]
    """Local folders of wheels, which precede the indexes."""
    ca_file: str | None
    """PEM file of the roots that TLS trusts; None for the system's."""


def index_settings(environment: Mapping[str, str] | None = None) -> IndexSettings:
    """Returns the settings by PIP_* and UV_* variables (os.environ by default) and pip.conf."""
    env = dict(os.environ if environment is None else environment)
    file = _pip_conf(env)
    main = (
        env.get("PIP_INDEX_URL")
        or env.get("UV_DEFAULT_INDEX")
        or env.get("UV_INDEX_URL")
        or file.get("index-url")
        or PUBLIC_INDEX
    )
    more = (
        *(env.get("PIP_EXTRA_INDEX_URL") or file.get("extra-index-url", "")).split(),
        *env.get("UV_INDEX", "").split(),
        *env.get("UV_EXTRA_INDEX_URL", "").split(),
    )
    offline = _is_on(env.get("PIP_NO_INDEX") or file.get("no-index", ""))
    urls = () if offline else tuple(dict.fromkeys(map(_without_name, (main, *more))))
    links = (env.get("PIP_FIND_LINKS") or file.get("find-links", "")).split()
    return IndexSettings(
        indexes=urls,
        folders=tuple(Path(link.removeprefix("file://")).expanduser() for link in links),
        ca_file=env.get("PIP_CERT") or file.get("cert") or env.get("REQUESTS_CA_BUNDLE") or None,
    )


def _without_name(index: str) -> str:
    """Returns the URL of an index that uv may name: `name=https://...`."""
    name, equals, url = index.partition("=")
    return url if equals and name.replace("-", "").replace("_", "").isalnum() else index


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _pip_conf(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the options of pip.conf that `pip download` would use; a later file and a narrower
    section win. A file that cannot be parsed is left out.
    """
    found: dict[str, str] = {}
    for path in _pip_conf_files(env):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for section in ("global", "download"):
            if parser.has_section(section):
                found.update({k.replace("_", "-"): v for k, v in parser.items(section)})
    return found


def _pip_conf_files(env: Mapping[str, str]) -> Iterator[Path]:
    """Yields where pip.conf may be, the strongest last: machine, user, environment, PIP_CONFIG_FILE
    (the null device disables all files).
    """
    own = env.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return
    home = Path(env.get("HOME") or Path.home())
    for folder in (env.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep):
        yield Path(folder) / "pip" / "pip.conf"
    yield Path("/etc/pip.conf")
    yield home / ".pip" / "pip.conf"
    yield Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if own:
        yield Path(own)
