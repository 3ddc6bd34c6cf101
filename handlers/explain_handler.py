"""TorchServe's entry point: a batch in, one answer for each request out."""

import logging
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from ts.metrics.metric_type_enum import MetricTypes

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.serving.service import Exchange, Row, Service
from torchserve_explain.serving.settings import read_settings

log = logging.getLogger(__name__)

# Name, type, unit and second dimension (the first is the model's name), as deploy/metrics.yaml declares them.
METRICS = (
    ("ExplainSeconds", MetricTypes.HISTOGRAM, "s", "Method"),
    ("ExplainCompletenessError", MetricTypes.HISTOGRAM, "fraction", "Method"),
    ("ExplainEvaluations", MetricTypes.COUNTER, "Count", "Method"),
    ("ExplainRefusals", MetricTypes.COUNTER, "Count", "Status"),
)


class ExplainHandler:
    """Serves an archive's classifier: predictions and explanations."""

    def initialize(self, context: Any) -> None:
        """Load the archive onto the device that TorchServe gives; raises ArchiveError where it does not fit together."""
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
        settings = read_settings(context.model_yaml_config or {})
        torch.backends.cudnn.allow_tf32 = False  # a gradient loses too much in ten bits
        keep_freed_memory()
        # Workers that each take every core slow each other down; OMP_NUM_THREADS may allow them less.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // settings.maxWorkers)))
        archive = Archive.load(Path(properties["model_dir"]), device)
        classifier, labels = archive.classifier, archive.labels
        self._metrics = {
            name: context.metrics.cache.get(kind, {}).get(name)
            or context.metrics.add_metric_to_cache(name, unit, ["ModelName", dimension], kind)
            for name, kind, unit, dimension in METRICS
        }
        version = str(context.manifest["model"].get("modelVersion", "1.0"))
        self._service = Service(classifier, labels, settings, {"name": context.model_name, "version": version})
        self._service.warm_up()
        log.info("%s %s on %s: %d classes, %d layers folded, last layer %s", context.model_name, version, device,
                 classifier.classes, classifier.folded, classifier.last_layer)  # fmt: skip
        for method, why in self._service.refused.items():
            log.info("%s cannot serve %s: %s", method, context.model_name, why)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer each request by itself; nothing is raised, since that would fail the whole batch."""
        rows = [
            Row(row, context.get_all_request_header(place), context.get_request_id(place) or "")
            for place, row in enumerate(data)
        ]
        exchanges = self._service.answer(rows)
        for place, exchange in enumerate(exchanges):
            answer = exchange.answer
            context.set_response_content_type(place, answer.content_type)
            if answer.status != HTTPStatus.OK:
                context.set_response_status(code=answer.status, phrase=HTTPStatus(answer.status).phrase, idx=place)
            self._measure(exchange, context.model_name)
        return [exchange.answer.body for exchange in exchanges]

    def _measure(self, exchange: Exchange, model: str) -> None:
        """Count what was explained and what was refused."""
        if exchange.answer.status != HTTPStatus.OK:
            self._metrics["ExplainRefusals"].add_or_update(1, [model, str(exchange.answer.status)])
        for explanation in (explanation for image in exchange.explanations for explanation in image):
            dimensions, explained = [model, explanation.method], explanation.explained
            self._metrics["ExplainSeconds"].add_or_update(explained.seconds, dimensions)
            self._metrics["ExplainEvaluations"].add_or_update(explained.evaluations, dimensions)
            if (error := explained.result.completeness_error) is not None:
                self._metrics["ExplainCompletenessError"].add_or_update(error, dimensions)
