"""A model and a server as KServe's package knows them, around a host."""

from collections.abc import Mapping
from typing import Any

from kserve import Model, ModelServer
from kserve.model import InferenceVerb
from kserve.model_server import app

from torchserve_explain.servers.host import Host
from torchserve_explain.servers.http import router
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import RawRequest


class Explained(Model):
    """An archive; KServe measures what passes through it."""

    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name)
        self._host = host
        self.load()

    async def version(self) -> str:
        """Return the version that the archive has."""
        return self._host.version

    async def ask(self, raw: RawRequest) -> Answer:
        """Return the answer to one request, by way of KServe's own hooks and times."""
        verb = InferenceVerb.EXPLAIN if "explain" in raw.headers else InferenceVerb.PREDICT
        answer: Answer
        answer, _ = await self(raw, {"x-request-id": raw.id}, verb)
        return answer

    async def predict(self, payload: RawRequest, headers: Mapping[str, str] | None = None) -> Answer:
        return await self._host.answer(payload)

    async def explain(self, payload: RawRequest, headers: Mapping[str, str] | None = None) -> Answer:
        return await self._host.answer(payload)

    def validate(self, payload: Any) -> Any:
        return payload

    def stop(self) -> None:
        super().stop()
        self._host.close()


class KServeServer(ModelServer):
    """KServe's server with the contract's routes before its own, on an address that can be chosen."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(http_port=port, workers=1, enable_grpc=False)
        self._host = host
        app.include_router(router(self.registered_models.get_models()))

    async def _serve(self) -> None:
        self._rest_server.config.host = self._host  # KServe listens on every address, and has no option for it
        await super()._serve()
