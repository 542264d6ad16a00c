"""What Prometheus reads from `/metrics`: requests as they are answered, and what the home folder holds when it is asked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasmith.schemas.jobs import JobStatus
from lorasmith.services.uploads import list_uploads
from lorasmith.services.workbench import Workbench

KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


class Metrics:
    """Of one application: a registry of its own, so that two in one process do not add up."""

    def __init__(self, workbench: Workbench) -> None:
        self.registry = CollectorRegistry()
        names = ("method", "route")
        self.requests = Counter(
            "lorasmith_http_requests", "Answered requests.", (*names, "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "lorasmith_http_request_seconds",
            "Time to the end of an answer.",
            names,
            registry=self.registry,
            buckets=BUCKETS_S,
        )
        self.running = Gauge("lorasmith_http_requests_running", "Requests being answered.", registry=self.registry)
        self.registry.register(HomeCollector(workbench))

    def text(self) -> bytes:
        """In Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)


class HomeCollector(Collector):
    """Counts rows and disk when it is read, so that the numbers are those of the database."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("lorasmith_jobs", "Jobs in each status.", labels=["status"])
        counts = self.workbench.jobs.counts()
        for status in JobStatus:
            jobs.add_metric([status.value], counts.get(status.value, 0))
        yield jobs
        yield GaugeMetricFamily("lorasmith_datasets", "Stored datasets.", value=self.workbench.datasets.count())
        yield GaugeMetricFamily("lorasmith_adapters", "Stored adapters.", value=self.workbench.adapters.count())
        uploads = GaugeMetricFamily("lorasmith_uploads", "Uploads without a dataset yet.", labels=["status"])
        statuses = [upload.status.value for upload in list_uploads(self.workbench)]
        for status_name in ("uploading", "processing", "error"):
            uploads.add_metric([status_name], statuses.count(status_name))
        yield uploads
        free = shutil.disk_usage(self.workbench.home).free
        yield GaugeMetricFamily("lorasmith_home_free_bytes", "Free bytes where the home folder is.", value=free)


class Measured:
    """Counts requests by their route's pattern; what has none, or was refused at the door, is `none`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500
        began = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.running.inc()
        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.running.dec()
            route = getattr(scope.get("route"), "path", None) or "none"
            method = scope["method"] if scope["method"] in KNOWN_METHODS else "other"
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(method, route).observe(time.perf_counter() - began)
