"""Serves archives with Ray Serve: `ARCHIVES=NAME=PATH,... serve run torchserve_explain.servers.ray:app`.

One application: routes without a model, and for each archive a deployment of its own, whose replicas grow with the
requests in flight. Needs the extra [ray].
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from torchserve_explain.errors import RequestError, ServerError
from torchserve_explain.servers.host import Host, named_archives
from torchserve_explain.servers.http import router
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import RawRequest

ARCHIVES = "ARCHIVES"
# Of an archive's deployment; a serve config may say otherwise by the archive's name.
SCALING = {
    "max_ongoing_requests": 32,
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
}


class Explainer:
    """One archive on one device; the engine batches, so Ray must not."""

    def __init__(self, name: str, path: str) -> None:
        self._host = Host.load(Path(path), name, "cuda" if ray.get_gpu_ids() else "cpu")

    async def version(self) -> str:
        """Return the version that the archive has."""
        return self._host.version

    async def answer(self, data: Mapping[str, Any], headers: Mapping[str, str], name: str) -> Answer:
        """Return the answer to one request, which arrives now: clocks of machines differ. Tensors stay here."""
        return replace(await self._host.answer(RawRequest(data, headers, name)), explanations=())


class Remote:
    """An archive's replicas as the routes know them."""

    def __init__(self, handle: "DeploymentHandle") -> None:
        self._handle = handle
        self._version: str | None = None

    async def version(self) -> str:
        """Return the version that the archive has; it is asked for once."""
        if self._version is None:
            self._version = await self._handle.version.remote()
        return self._version

    async def ask(self, raw: RawRequest) -> Answer:
        """Return the answer of one of the replicas; raises RequestError 503 where it ends meanwhile."""
        try:
            answer: Answer = await self._handle.answer.remote(raw.data, raw.headers, raw.id)
        except RayActorError:
            message = "the replica that worked on it has ended; try again"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, message, {"Retry-After": "1"}) from None
        return answer


class Routes:
    """The contract's routes."""

    def __init__(self, handles: "dict[str, DeploymentHandle]") -> None:
        self._models = {name: Remote(handle) for name, handle in handles.items()}

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that Ray serves."""
        routes = FastAPI()
        routes.include_router(router(self._models))
        return routes


def application(archives: Mapping[str, Path]) -> Application:
    """Return the application of archives by their names."""
    routes = serve.deployment(
        serve.ingress()(Routes), name="routes", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    explainers = {name: serve.deployment(Explainer, name=name, **SCALING) for name in archives}
    return routes.bind({name: explainer.bind(name, str(archives[name])) for name, explainer in explainers.items()})


def __getattr__(name: str) -> Application:
    """Return `app`, built when it is asked for; raises ServerError where nothing is to be served."""
    if name != "app":
        raise AttributeError(name)
    named = [one.strip() for one in os.environ.get(ARCHIVES, "").split(",") if one.strip()]
    if not named:
        raise ServerError(f"{ARCHIVES} is empty; allowed: a comma list of archives, each PATH or NAME=PATH")
    return application(named_archives(named))
