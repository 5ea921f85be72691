"""Effective settings: loaded from flags, environment and YAML file, and described with origins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.settings_file import SettingsFile


def load_config(flags: Mapping[str, object]) -> ServerConfig:
    """Returns the effective settings, given the flags that were set. Raises ConfigError."""
    file = None
    try:
        file = _sources(flags)[0]
        if file is not None and not file.is_file():
            raise ConfigError(f"config: no such file: {file}; name a YAML file of settings")
        return _checked(ServerConfig(**dict[str, Any](flags)))
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc'][:1]))}: {e['msg']}" for e in error.errors())
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # YAML's errors have several lines
        raise ConfigError(f"config: {file}: not a YAML mapping of settings: {reason}") from error


def _checked(config: ServerConfig) -> ServerConfig:
    """Returns `config`. Raises ConfigError if its settings contradict each other."""
    if config.adapter_mode == "merged" and not config.merged_bytes:
        raise ConfigError("adapter_mode: merged needs merged_bytes above 0")
    return config


def describe(config: ServerConfig, flags: Mapping[str, object]) -> str:
    """Returns `config` as YAML that can be read back, each value with its origin as a comment."""
    file, env = _sources(flags)
    origin = dict.fromkeys(SettingsFile(ServerConfig, yaml_file=file)(), str(file))
    origin |= {name: f"ADAPLEX_{name.upper()}" for name in env}
    origin |= dict.fromkeys(flags, "flag")
    return "\n".join(
        f"{name}: {json.dumps(value)}  # {origin.get(name, 'default')}"  # JSON is YAML
        for name, value in config.model_dump(mode="json", exclude={"config"}).items()
    )


def _sources(flags: Mapping[str, object]) -> tuple[Path | None, dict[str, Any]]:
    """Returns the YAML file in use, and the settings of the environment."""
    env = EnvSettingsSource(ServerConfig, env_ignore_empty=True)()
    named = flags.get("config", env.get("config"))
    return (Path(str(named)) if named else None), env
