from __future__ import annotations

from inference.server.metrics import Histogram, Metrics


def test_the_text_is_prometheus_format():
    metrics = Metrics()
    metrics.requests.add(path="/v1/models", status="200")
    metrics.requests.add(path='a"b\\c\nd', status="404")
    metrics.new_tokens.add(3)
    metrics.gauge("g", "a gauge", lambda: 1.5)
    metrics.total("t_total", "a counter kept elsewhere", lambda: 7)
    lines = metrics.text().splitlines()
    assert 'planaria_requests_total{path="/v1/models",status="200"} 1' in lines
    assert r'planaria_requests_total{path="a\"b\\c\nd",status="404"} 1' in lines
    assert "planaria_new_tokens_total 3" in lines
    assert "planaria_prompt_tokens_total 0" in lines
    assert lines[lines.index("# TYPE g gauge") + 1] == "g 1.5"
    assert lines[lines.index("# TYPE t_total counter") + 1] == "t_total 7"
    assert metrics.text().endswith("\n")


def test_a_histogram_counts_at_or_below_each_limit():
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.1, 1), (0.5, 2), (5.0, 1)):
        histogram.observe(value, times)
    assert list(histogram.samples()) == [
        ("_bucket", (("le", "0.1"),), 1),
        ("_bucket", (("le", "1"),), 3),
        ("_bucket", (("le", "+Inf"),), 4),
        ("_sum", (), 6.1),
        ("_count", (), 4),
    ]
