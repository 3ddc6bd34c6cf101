"""TorchServe's entry point: requests in flight in, answers of the finished out."""

import logging
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.servers.host import Host
from torchserve_explain.servers.in_flight import InFlight
from torchserve_explain.servers.torchserve_metrics import Metrics
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import RawRequest, Service, error_answer
from torchserve_explain.serving.settings import read_settings

log = logging.getLogger(__name__)


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
        self._continuous = settings.continuousBatching
        version = str(context.manifest["model"].get("modelVersion", "1.0"))
        service = Service(
            classifier, labels, archive.settings, {"name": context.model_name, "version": version}, archive.digest
        )
        host = Host(service, version)
        self._metrics = Metrics(context, host.engine, service)
        host.warm_up()
        self._in_flight = InFlight(host, service.limits.quantum / 1000)
        log.info("%s %s on %s: %d classes, %d layers folded, last layer %s, %s batching", context.model_name, version, device,
                 classifier.classes, classifier.folded, classifier.last_layer,
                 "continuous" if self._continuous else "classic")  # fmt: skip
        for method, why in service.refused.items():
            log.info("%s cannot serve %s: %s", method, context.model_name, why)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer what is finished; nothing is raised, since that would fail all requests in flight.

        With continuous batching the frontend hands over all requests in flight again and again. One that is left out of
        `context.request_ids` stays in flight; without it every request is answered now.
        """
        ids: dict[int, str] = dict(context.request_ids)
        self._metrics.tell_in_flight(len(ids))  # before the first pass, which may be long
        requests = {name: lambda index=index: self._raw(data, context, index) for index, name in ids.items()}
        try:
            answers = self._in_flight.call(requests) if self._continuous else self._in_flight.answer_all(requests)
        except Exception as error:
            self._in_flight.forget_all()
            answers = dict.fromkeys(requests, error_answer(error))
        bodies = [b""] * len(data)
        for index, name in ids.items():
            if name in answers:
                bodies[index] = self._respond(answers[name], context, index)
            else:
                del context.request_ids[index]
        self._metrics.after_call(len(self._in_flight))
        return bodies

    @staticmethod
    def _raw(data: list[dict[str, Any]], context: Any, index: int) -> RawRequest:
        return RawRequest(data[index], context.get_all_request_header(index), context.get_request_id(index) or "")

    def _respond(self, answer: Answer, context: Any, index: int) -> bytes:
        """Set what TorchServe sends beside a body, and count the answer."""
        context.set_response_content_type(index, answer.content_type)
        if answer.status != HTTPStatus.OK:
            context.set_response_status(code=answer.status, phrase=HTTPStatus(answer.status).phrase, idx=index)
        for name, value in answer.headers.items():
            context.set_response_header(index, name, value)
        self._metrics.answered(answer)
        for one in answer.explanations:
            log.info("%s of %s: %d evaluations, %.0f ms of %.0f ms, %d", one.method, one.target.index, one.evaluations,
                     1000 * one.explained.seconds, 1000 * answer.seconds, answer.status)  # fmt: skip
        return answer.body
