"""server/METRICS.md, from the table of metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adaplex.server.metric_table import LABELS, METRICS, RPC_METRICS, MetricSpec
from tools.docs.markdown import code, page, table

INTRO = """\
Every metric of `http://HOST:9400/metrics`, in the Prometheus text format. A metric that vLLM has
too keeps its name, labels and buckets under the prefix `adaplex_`; `--vllm-metric-names` exposes it
under `vllm:` as well. A histogram has the series `_bucket`, `_sum` and `_count`. Every metric of
the first table has the label `model_name`, too."""


def document() -> str:
    """Returns the page."""
    return page("Metrics", INTRO, "server/adaplex/server/metric_table.py", _sections())


def _sections() -> Iterator[str]:
    header = ("name", "type", "labels", "meaning", "vLLM's name")
    yield "## Server\n\n" + table(header, _rows(METRICS))
    header = ("name", "type", "labels", "meaning")
    yield "## RPCs\n\n" + table(header, (row[:4] for row in _rows(RPC_METRICS, prefix="")))
    labels = ((code(name), meaning) for name, meaning in LABELS.items())
    yield "## Labels\n\n" + table(("label", "meaning and values"), labels)


def _rows(metrics: Mapping[str, MetricSpec], prefix: str = "adaplex_") -> Iterator[tuple[str, ...]]:
    for name, spec in metrics.items():
        suffix = "_total" if spec.kind == "counter" else ""
        vllm = f"vllm:{name}{suffix}" if spec.vllm else ""
        labels = ", ".join(map(code, spec.labels))
        yield code(f"{prefix}{name}{suffix}"), spec.kind, labels, spec.help, code(vllm)
