"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What is counted, by the names under which it is read."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self.requests = Counter(
            "certify_requests", "Requests that got a response, refusals too.", ["route", "status"], registry=of
        )
        self.rejected = Counter("certify_rejected", "Requests that were refused.", ["reason"], registry=of)
        self.seconds = Histogram(
            "certify_request_seconds", "Seconds from a request to its answer.", ["route"], buckets=_SECONDS, registry=of
        )
        self.images = Counter("certify_images", "Images that were answered.", ["outcome"], registry=of)
        self.samples = Counter("certify_samples", "Noise samples that were labelled.", registry=of)
        self.failures = Counter("certify_failures", "Noise samples that got no label.", registry=of)
        self.abstentions = Counter("certify_abstentions", "Images about which nothing is claimed.", registry=of)
        self.beyond = Gauge(
            "certify_labels_beyond", "Answers of the service with a label beyond --num-classes.", registry=of
        )
        self.queue = Gauge("certify_queue_length", "Requests that are read, wait or are in work.", registry=of)

    def text(self) -> bytes:
        """In the text format that Prometheus reads."""
        return generate_latest(self.registry)
