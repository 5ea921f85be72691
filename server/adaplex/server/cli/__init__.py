"""Commands that need the server's packages: `serve`, and offline commands for adapters.

Modules here import those packages within functions, so that help which lists the commands is quick.
"""

from importlib.util import find_spec

if find_spec("pydantic_settings") is None:
    raise ModuleNotFoundError("No module named 'pydantic_settings'")
