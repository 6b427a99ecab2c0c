"""Middleware for vLLM that allows only the OpenAI API, the health check and the metrics.

vLLM checks the API key only for paths below /v1, while /invocations and others reach the model as well.
"""

from typing import Any

from starlette.responses import JSONResponse


class OnlyV1:
    """Answer 404 to every path except /v1/..., /health and /metrics."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path not in ("/health", "/metrics") and not path.startswith("/v1/"):
                message = f"There is no {path} here. Use a path below /v1, for example /v1/chat/completions."
                error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
                return await JSONResponse({"error": error}, 404)(scope, receive, send)
        await self.app(scope, receive, send)
