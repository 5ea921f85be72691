"""SettingsFile: settings from a YAML file, in which each name occurs once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic_settings import YamlConfigSettingsSource


class SettingsFile(YamlConfigSettingsSource):
    """Settings of one file. Raises yaml.YAMLError or ValueError if it is no mapping of settings."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        with Path(file_path).open(encoding=self.yaml_file_encoding) as file:
            # _UniqueKeys is a safe loader.
            settings = yaml.load(file, _UniqueKeys)
        if settings is None:
            return {}
        if not isinstance(settings, dict):
            raise ValueError(f"the file is a {type(settings).__name__}, not a mapping")
        bad_keys = [key for key in settings if not isinstance(key, str)]
        if bad_keys:
            raise ValueError(f"{bad_keys[0]!r} is not a setting")
        if "config" in settings:
            raise ValueError("'config' cannot be set in a file; a flag or ADAPLEX_CONFIG names it")
        return settings


class _UniqueKeys(yaml.SafeLoader):
    """Refuses repeated keys, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} is set twice", problem_mark=key.start_mark
                )
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)
