"""The host of asynchronous servers: many at once as if alone, cancellation, failures, and a clean end."""

import asyncio
import json
from dataclasses import replace
from threading import Event

import pytest
from live import picture
from test_in_flight import explain, predict, service  # noqa: F401

from torchserve_explain.attribution.computation import Piece, background
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.errors import RequestError
from torchserve_explain.servers.host import Host
from torchserve_explain.serving.service import RawRequest


@pytest.fixture
def host(service):  # noqa: F811
    service._places = None  # as Host.load has it
    running = Host(service)
    yield running
    running.close()
    assert not running._thread.is_alive()


def request(number):
    """Return a request of one of several kinds, its image its own; the fourth kind is refused."""
    fields = ({}, {"method": b"sensitivity"}, {"method": b"grad_cam"}, {"method": b"nonsense"})[number % 4]
    return RawRequest({"data": picture(number), **fields}, {"explain": "True"} if fields else {})


def comparable(answer):
    """Return what must not depend on neighbours."""
    told = json.loads(answer.body)
    for one in told.get("explanations", []):
        del one["milliseconds"]
    return answer.status, told


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_many_at_once_are_answered_as_if_alone(host):
    async def ask():
        together = await asyncio.gather(*(host.answer(request(number)) for number in range(24)))
        alone = [await host.answer(request(number)) for number in range(24)]
        return together, alone

    together, alone = asyncio.run(ask())
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        (status, found), (_, expected) = comparable(one), comparable(other)
        assert status == other.status == (400 if number % 4 == 3 else 200)
        if number % 4 == 0:
            assert found == pytest.approx(expected, rel=1e-4)
        elif number % 4 < 3:
            assert found["predicted"]["index"] == expected["predicted"]["index"]
            for name in ("minimum", "maximum"):
                expected_value = expected["explanations"][0]["heatmap"][name]
                assert found["explanations"][0]["heatmap"][name] == pytest.approx(expected_value, rel=1e-3, abs=1e-6)


def test_a_short_request_overtakes_a_long_one(host):
    async def ask():
        long = asyncio.ensure_future(host.answer(explain()))
        await until(lambda: host._waiting)
        short = await host.answer(predict())
        return long.done(), short.status, (await long).status

    assert asyncio.run(ask()) == (False, 200, 200)


def test_a_cancelled_request_is_dropped_from_the_engine(host):
    async def ask():
        task = asyncio.ensure_future(host.answer(replace(explain(), id="gone")))
        await until(lambda: host.engine.in_flight)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not host._waiting)
        return host.engine.in_flight, (await host.answer(predict())).status

    assert asyncio.run(asyncio.wait_for(ask(), 60)) == (0, 200)


def test_an_exception_on_the_thread_is_a_500_and_the_host_lives_on(host, monkeypatch):
    async def ask():
        with monkeypatch.context() as broken:
            broken.setattr(host.engine, "step", lambda: 1 / 0)
            failed = await asyncio.gather(host.answer(predict()), host.answer(explain()))
        return [answer.status for answer in failed], (await host.answer(predict())).status

    assert asyncio.run(ask()) == ([500, 500], 200)


def test_a_request_that_cannot_even_be_taken_is_a_500(host, monkeypatch):
    monkeypatch.setattr(host._service, "deadline", lambda _raw: 1 / 0)

    async def ask():
        return (await asyncio.wait_for(host.answer(predict()), 60)).status

    assert asyncio.run(ask()) == 500


def test_what_is_in_flight_when_the_host_closes_gets_503(service):  # noqa: F811
    host = Host(service)

    async def ask():
        task = asyncio.ensure_future(host.answer(explain()))
        await until(lambda: host.engine.in_flight)
        await asyncio.to_thread(host.close)
        with pytest.raises(RequestError, match="stopping"):
            await host.answer(predict())
        return (await task).status

    assert asyncio.run(ask()) == 503 and host.engine.in_flight == 0
    host.close()  # again, which does nothing


def test_an_engine_that_waits_for_a_thread_is_woken_by_another(classifier):
    engine, release = Engine(classifier, 4), Event()
    task = engine.add(Piece(background(release.wait, 30)))
    engine.wake()
    engine.step()  # returns though the thread has not ended
    assert engine.in_flight == 1
    release.set()
    while task.outcome is None:
        engine.step()
    engine.close()
