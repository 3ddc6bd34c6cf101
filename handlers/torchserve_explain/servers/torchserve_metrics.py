"""What the handler measures, in TorchServe's metrics; deploy/metrics.yaml declares them."""

import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from torchserve_explain.attribution.engine import Engine
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import Service

# Name, type, unit, and the dimension beside the model's name, if there is one.
METRICS = (
    ("ExplainSeconds", MetricTypes.HISTOGRAM, "s", "Method"),
    ("ExplainCompletenessError", MetricTypes.HISTOGRAM, "fraction", "Method"),
    ("ExplainEvaluations", MetricTypes.COUNTER, "Count", "Method"),
    ("ExplainRefusals", MetricTypes.COUNTER, "Count", "Status"),
    ("RequestSeconds", MetricTypes.HISTOGRAM, "s", "Kind"),
    ("RequestsInFlight", MetricTypes.GAUGE, "Count", "ModelVersion"),
    ("WorkerMemory", MetricTypes.GAUGE, "MB", "ModelVersion"),
    ("EnginePasses", MetricTypes.COUNTER, "Count", None),
    ("EngineRows", MetricTypes.COUNTER, "Count", None),
    ("StageSeconds", MetricTypes.COUNTER, "s", "Stage"),
)

TELLING = 1.0  # seconds between two tellings of the totals under load


def worker_memory() -> float:
    """Return the memory that this process holds, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Metrics:
    """Counts answers, and what the engine and the service spend on them."""

    def __init__(self, context: Any, engine: Engine, service: Service) -> None:
        self._model, self._engine, self._service = context.model_name, engine, service
        # Counters of two versions of a model add up; gauges would overwrite each other.
        self._version = str(context.manifest["model"].get("modelVersion", "1.0"))
        self._metrics = {
            name: context.metrics.cache.get(kind, {}).get(name)
            or context.metrics.add_metric_to_cache(name, unit, ["ModelName", *([dimension] if dimension else [])], kind)
            for name, kind, unit, dimension in METRICS
        }
        self._told_at = 0.0
        self._told: dict[tuple[str, str | None], float] = {}  # totals that have been added so far
        self._in_flight: int | None = None  # as reported last
        self.after_call(0)  # what a worker that was killed held is held no longer

    def answered(self, answer: Answer) -> None:
        """Count an answer, and what was explained or refused with it."""
        self._add("RequestSeconds", answer.seconds, answer.kind)
        if answer.status != HTTPStatus.OK:
            self._add("ExplainRefusals", 1, str(answer.status))
        for explanation in answer.explanations:
            self._add("ExplainSeconds", explanation.explained.seconds, explanation.method)
            self._add("ExplainEvaluations", explanation.evaluations, explanation.method)
            if (error := explanation.explained.value.completeness_error) is not None:
                self._add("ExplainCompletenessError", error, explanation.method)

    def tell_in_flight(self, count: int) -> None:
        """Tell how many requests are in flight where that has changed; who waits for none looks at nothing else."""
        if self._in_flight != count:
            self._in_flight = count
            self._add("RequestsInFlight", count, self._version)

    def after_call(self, in_flight: int) -> None:
        """Tell how many requests are still in flight, and once a second or when idle what has grown since."""
        self.tell_in_flight(in_flight)
        now = time.monotonic()
        if in_flight and now < self._told_at + TELLING:
            return  # each costs a line of the worker's log
        self._told_at = now
        self._add("WorkerMemory", worker_memory(), self._version)
        totals: list[tuple[str, str | None, float]] = [
            ("EnginePasses", None, self._engine.passes),
            ("EngineRows", None, self._engine.rows),
            ("StageSeconds", "passes", self._engine.seconds),
            *(("StageSeconds", stage, seconds) for stage, seconds in self._service.stage_seconds.items()),
        ]
        for name, dimension, total in totals:
            if (grown := total - self._told.get((name, dimension), 0)) > 0:
                self._told[name, dimension] = total
                self._add(name, grown, dimension)

    def _add(self, name: str, value: float, dimension: str | None = None) -> None:
        dimensions = [self._model] if dimension is None else [self._model, dimension]
        self._metrics[name].add_or_update(value, dimensions)
