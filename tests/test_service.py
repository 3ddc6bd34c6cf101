"""The service between TorchServe and the engine: time runs out for whom it must, and for nobody else."""

import pytest
import torch
from conftest import small_cnn
from live import picture

from attribution.classifier import Classifier
from serving.service import Row, Service
from serving.settings import Settings

CONFIG = {
    "classifier": {"architecture": "model.py"},
    "preprocessing": {"resize": 32, "crop": 32},
    "responseTimeout": 100,
    "explanations": {"limits": {"seconds": 50}},
}


@pytest.fixture
def service():
    settings = Settings.model_validate(CONFIG)
    preprocessing = settings.preprocessing
    classifier = Classifier(small_cnn().float(), preprocessing.normalization, preprocessing.size)
    return Service(classifier, [], settings, {"name": "small", "version": "1.0"})


def statuses(service, monkeypatch, times, rows):
    """Answer rows on a clock that shows `times`, and then the last of them for ever."""
    clock = iter(times)
    last = times[-1]
    monkeypatch.setattr("serving.service.time.monotonic", lambda: next(clock, last))
    return [exchange.answer.status for exchange in service.answer(rows)]


PREDICTION = Row({"data": picture()}, {})
EXPLANATION = Row({"data": picture(), "method": b"sensitivity"}, {"explain": "True"})


def test_decoding_that_takes_too_long_is_cut_short(service, monkeypatch):
    assert statuses(service, monkeypatch, [0, 0, 51], [PREDICTION, PREDICTION]) == [200, 504]


def test_answers_that_would_come_after_the_worker_is_killed_are_not_drawn(service, monkeypatch):
    assert statuses(service, monkeypatch, [0, 0, 0, 10, 76], [PREDICTION, EXPLANATION]) == [200, 504]


def test_a_fault_of_ours_is_told_without_its_details(service, monkeypatch):
    monkeypatch.setattr("serving.service.Told", lambda *_: 1 / 0)
    failed, fine = (exchange.answer for exchange in service.answer([EXPLANATION, PREDICTION]))
    assert failed.status == 500 and b"log" in failed.body and b"division" not in failed.body
    assert fine.status == 200


def test_a_model_that_answers_nan_is_a_500_and_never_nan_in_json(service, monkeypatch):
    monkeypatch.setattr(service._engine, "logits", lambda inputs: torch.full((len(inputs), 5), float("nan")))
    for exchange in service.answer([PREDICTION, EXPLANATION]):
        assert exchange.answer.status == 500 and b"NaN" not in exchange.answer.body


def test_an_answer_larger_than_torchserve_can_carry_is_refused(service):
    service._limits = service._limits.model_copy(update={"answer_bytes": 1000})
    large, small = (exchange.answer for exchange in service.answer([EXPLANATION, PREDICTION]))
    assert large.status == 422 and b"bytes" in large.body
    assert small.status == 200
