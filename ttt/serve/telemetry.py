"""Tracing of requests with OpenTelemetry, for ``ttt serve --telemetry``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI


def trace_requests(app: FastAPI) -> Callable[[], None]:
    """Have a span made of every request of ``app`` and sent by OTLP over HTTP.

    OpenTelemetry's own environment variables say where to and under which name: ``OTEL_EXPORTER_OTLP_ENDPOINT``
    (``http://localhost:4318`` by default), ``OTEL_SERVICE_NAME`` ("ttt-serve" by default), and so on. A span holds the
    path of its request, which names a user where the request does, and no header or body.

    Returns:
        A function that sends what has not been sent yet, and ends tracing.

    Raises:
        ImportError: if the packages of the extra ``telemetry`` are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ImportError(f"{error}; --telemetry needs: pip install 'ttt[telemetry]'") from error
    name = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "ttt-serve"}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, exclude_spans=["receive", "send"])
    return provider.shutdown
