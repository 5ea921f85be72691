from __future__ import annotations

from deploy.promql import as_prometheus, groupings, metrics_in, selectors

RATIO = (
    'sum by (job, tier) (rate(a_total{tier=~"x|y", code!="{b}"}[5m])) / on (job) '
    "group_left () b_total offset 5m > 1e3 and absent(c) unless bool d"
)


def test_functions_operators_labels_and_strings_are_not_metrics() -> None:
    assert metrics_in(RATIO) == {"a_total", "b_total", "c", "d"}


def test_matched_labels_belong_to_their_metric() -> None:
    assert dict(selectors(RATIO))["a_total"] == {"tier", "code"}
    assert dict(selectors(RATIO))["b_total"] == set()


def test_groupings_are_collected() -> None:
    assert groupings(RATIO) == {"job", "tier"}


def test_known_variables_are_replaced_and_unknown_ones_stay() -> None:
    assert as_prometheus('x{a=~"$adapter"}[$__rate_interval] + $y') == 'x{a=~".*"}[5m] + $y'
