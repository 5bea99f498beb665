"""Tracing of requests with OpenTelemetry, for ``ttt serve --telemetry``."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import Any

from fastapi import FastAPI

from ttt.installing import how_to_install
from ttt.serve.http.middleware import App, Receive, Scope, Send, route_of


def require_packages() -> None:
    """Raise ImportError, which says what to install, if the packages of the extra ``telemetry`` are missing."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; --telemetry needs: {how_to_install('telemetry')}") from error


def trace_requests(app: FastAPI) -> Callable[[], None]:
    """Have a span made of every request of ``app`` and sent by OTLP over HTTP.

    A span has the method, the route ("/v1/users/{user}"), the status and the time, and the trace that the client named;
    nothing else of what the client sent, and of an error only its class. OpenTelemetry's own environment variables say
    where to and under which name: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (``http://localhost:4318`` by default),
    ``OTEL_SERVICE_NAME`` ("ttt-serve" by default), and so on.

    Returns:
        A function that sends what has not been sent yet, and ends tracing.

    Raises:
        ImportError: as `require_packages`.
    """
    require_packages()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "ttt-serve"}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    app.add_middleware(Traced, tracer=provider.get_tracer("ttt.serve"))
    return provider.shutdown


class Traced:
    """Passes requests on to ``app``, and makes a span of each with ``tracer``."""

    def __init__(self, app: App, *, tracer: Any) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        parent = TraceContextTextMapPropagator().extract(headers)
        span = self.tracer.start_span(scope["method"], context=parent, kind=SpanKind.SERVER)
        span.set_attribute("http.request.method", scope["method"])

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)  # its text may repeat what the client sent
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            route = route_of(scope)
            span.set_attribute("http.route", route)
            span.update_name(f"{scope['method']} {route}")
            span.end()
