"""Answers of the engine, with its failures as errors of the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from dist_vlm.executor.base import ExecutorError
from dist_vlm.inputs import PromptInputs
from dist_vlm.outputs import RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.server.errors import ApiError, api_error
from dist_vlm.server.metrics import RequestMeter
from dist_vlm.server.services import Services


async def answers(
    services: Services, inputs: PromptInputs, params: SamplingParams, *, request_id: str, meter: RequestMeter
) -> AsyncGenerator[RequestOutput, None]:
    """A request's output each time it has grown; the last one is finished. Closing it aborts the request.

    Raises `ApiError`: 400 for what the engine cannot serve, 503 if it is gone, 500 if this request failed in it.
    """
    try:
        async with aclosing(services.llm.generate(inputs, params, request_id)) as outputs:
            async for output in outputs:
                meter.saw(output)
                if output.error is not None:
                    raise _failure(services, output.error)
                yield output
    except ExecutorError as error:
        raise _gone(error) from error
    except ValueError as error:
        raise api_error(error) from error
    except RuntimeError as error:
        if services.llm.is_running:
            raise
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1) from error
    except (GeneratorExit, asyncio.CancelledError):
        services.metrics.aborted.inc()
        raise


def _failure(services: Services, cause: str) -> ApiError:
    if services.llm.dead_error is not None:
        return _gone(services.llm.dead_error)
    return ApiError(500, f"the request failed in the engine: {cause}", code="engine_error")


def _gone(error: ExecutorError) -> ApiError:
    """Without its cause, which may be a library's: the log has that."""
    where = "" if error.rank is None else f", rank {error.rank}"
    return ApiError(503, f"the engine has ended (stage {error.stage}{where})", code="engine_dead", retry_after_s=10)
