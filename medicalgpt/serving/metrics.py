"""Metrics of a server for Prometheus.

Where a number means what it means in vLLM, it has vLLM's name, so that dashboards and alerts fit both; those of HTTP
have the names of OpenTelemetry (https://opentelemetry.io/docs/specs/semconv/http/http-metrics/).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial

from medicalgpt.serving.generation import Answer
from medicalgpt.serving.server_logs import RequestRecord

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# Seconds: of whole requests, and from token to token.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
# Numbers of tokens.
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """What /metrics shows.

    Args:
        load: returns, for each model by its name in requests, how many of its answers are being generated, and how many
            requests to it are queued.
    """

    def __init__(self, load: Callable[[], Mapping[str, tuple[int, int]]]):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_LoadCollector(load))
        count = partial(Counter, labelnames=["model_name"], registry=self.registry)
        spread = partial(Histogram, labelnames=["model_name"], registry=self.registry)
        self.prompt_tokens = count("vllm:prompt_tokens", "Tokens of prompts that the model has begun to read.")
        self.generation_tokens = count("vllm:generation_tokens", "Tokens generated, those of cancelled answers too.")
        self.success = Counter(
            "vllm:request_success", "Complete answers.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.first_token = spread(
            "vllm:time_to_first_token_seconds", "From a request to its first token.", buckets=BUCKETS
        )
        self.inter_token = spread(
            "vllm:inter_token_latency_seconds", "From one token of an answer to the next.", buckets=TOKEN_BUCKETS
        )
        self.queue_time = spread("vllm:request_queue_time_seconds", "Time in the queue.", buckets=BUCKETS)
        self.seconds = spread(
            "vllm:e2e_request_latency_seconds", "From a request to its complete answer.", buckets=BUCKETS
        )
        self.prompt_length = spread(
            "vllm:request_prompt_tokens", "Tokens of the prompts of complete answers.", buckets=LENGTH_BUCKETS
        )
        self.answer_length = spread(
            "vllm:request_generation_tokens", "Tokens of complete answers.", buckets=LENGTH_BUCKETS
        )
        self.http_seconds = Histogram(
            "http_server_request_duration_seconds",
            "From a request to the end of its response. 499: the client left.",
            ["http_request_method", "http_route", "http_response_status_code"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        for model in load():
            # Shown from the beginning, so that an increase from none at all is seen.
            for each in (self.prompt_tokens, self.generation_tokens, self.first_token, self.inter_token):
                each.labels(model)
            for each in (self.queue_time, self.seconds, self.prompt_length, self.answer_length):
                each.labels(model)

    def observe_http(self, record: RequestRecord, route: str) -> None:
        """Count a request that has ended."""
        self.http_seconds.labels(record.method, route, record.status).observe(record.seconds)


class _LoadCollector(Collector):
    """Counts at the moment when it is asked, of the models that there are then."""

    def __init__(self, load: Callable[[], Mapping[str, tuple[int, int]]]):
        self.load = load

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Answers being generated.", labels=["model_name"])
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Queued requests.", labels=["model_name"])
        for model, counts in self.load().items():
            for family, count in zip((running, waiting), counts, strict=True):
                family.add_metric([model], count)
        yield from (running, waiting)


class AnswerTimer:
    """Measures one answer on its way; `on_start` and `on_token` are those of a `GenerationRequest`.

    Args:
        model: its name in requests.
        record: of the request that it belongs to, whose tokens are counted.
        prompt_tokens: tokens of its prompt.
    """

    def __init__(self, metrics: Metrics, model: str, record: RequestRecord, prompt_tokens: int):
        self.record = record
        self.prompt_tokens = prompt_tokens
        self.queued = time.monotonic()
        self.last: float | None = None
        # Looked up once: this is done at every token.
        self.metrics, self.model = metrics, model
        self._tokens = metrics.generation_tokens.labels(model)
        self._inter_token = metrics.inter_token.labels(model)

    def on_start(self) -> None:
        self.metrics.queue_time.labels(self.model).observe(time.monotonic() - self.queued)
        self.metrics.prompt_tokens.labels(self.model).inc(self.prompt_tokens)

    def on_token(self) -> None:
        now = time.monotonic()
        if self.last is None:
            self.metrics.first_token.labels(self.model).observe(now - self.record.started)
        else:
            self._inter_token.observe(now - self.last)
        self.last = now
        self._tokens.inc()
        self.record.completion_tokens += 1

    def on_done(self, future: "Future[Answer]") -> None:
        """Count the answer if it is complete; a callback of its future."""
        if future.cancelled() or future.exception() is not None:
            return
        answer, metrics, model = future.result(), self.metrics, self.model
        metrics.success.labels(model, answer.finish_reason).inc()
        metrics.seconds.labels(model).observe(self.record.seconds)
        metrics.prompt_length.labels(model).observe(answer.prompt_tokens)
        metrics.answer_length.labels(model).observe(answer.completion_tokens)
