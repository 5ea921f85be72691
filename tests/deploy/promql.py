"""Just enough PromQL to tell which metrics an expression reads, and by which labels."""

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
    """A panel's expression with Grafana's variables filled in; an unknown one stays."""
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return expression


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric it reads, with the labels that are matched."""
    bare = RANGE.sub(" ", GROUPING.sub(" ", STRING.sub('""', expression)))
    for name, matchers in SELECTOR.findall(bare):
        if name not in OPERATORS:
            yield name, set(MATCHER.findall(matchers))


def metrics_in(expression: str) -> set[str]:
    """Names of the metrics it reads."""
    return {name for name, _ in selectors(expression)}


def groupings(expression: str) -> set[str]:
    """Labels that it groups or joins by."""
    lists = GROUPING.findall(STRING.sub('""', expression))
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}
