"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Replace = Annotated[bool, typer.Option("--replace", help="Give an existing name a new version.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
