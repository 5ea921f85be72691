"""A minimal PromQL parser: the metrics that an expression reads, and their labels."""

from __future__ import annotations

import re
from collections.abc import Iterator

OPERATORS = {"and", "bool", "offset", "or", "unless"}
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
RANGE = re.compile(r"\[[^\]]*\]")
SELECTOR = re.compile(r"(?<![\w.])([a-zA-Z_:][\w:]*+)(?!\s*\()(?:\s*\{([^}]*)\})?")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GRAFANA = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$model_name": ".*",
    "$instance": ".*",
    "$adapter": ".*",
}


def as_prometheus(expression: str) -> str:
    """Replaces Grafana's variables in a panel's expression; unknown ones stay."""
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return expression


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yields each metric that an expression reads, with the labels that it matches."""
    bare = RANGE.sub(" ", GROUPING.sub(" ", STRING.sub('""', expression)))
    for name, matchers in SELECTOR.findall(bare):
        if name not in OPERATORS:
            yield name, set(MATCHER.findall(matchers))


def metrics_in(expression: str) -> set[str]:
    """Returns the names of the metrics that an expression reads."""
    return {name for name, _ in selectors(expression)}


def groupings(expression: str) -> set[str]:
    """Returns the labels by which an expression groups or joins."""
    lists = GROUPING.findall(STRING.sub('""', expression))
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}
