"""Answer every request with {} and do nothing else: what any service on uvicorn costs at least.

python nbs/benchmarks/peers/serving_floor.py PORT uvicorn|fastapi
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response


async def bare(scope: dict, receive: Any, send: Any) -> None:
    """An ASGI application without a framework, which reads the body."""
    while (await receive()).get("more_body"):
        pass
    head = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": b"{}"})


framework = FastAPI(openapi_url=None)


@framework.post("/")
async def empty(request: Request) -> Response:
    """The same as a route, in the event loop."""
    await request.body()
    return Response(b"{}", media_type="application/json")


if __name__ == "__main__":
    app = {"uvicorn": bare, "fastapi": framework}[sys.argv[2]]
    options = {"log_level": "warning", "access_log": False, "lifespan": "off"}
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), **options)
