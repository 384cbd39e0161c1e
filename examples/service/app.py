"""A small service around an enabled pipeline: a queue with batches, progress by server-sent events, metrics, and a page.

    pip install 'qwen-fast[serve]'
    python examples/service/app.py [--model Qwen/Qwen-Image] [--port 8000] [--warmup 1024x1024]

POST /pictures          a picture at once: {"prompt": "a cat", "width": 1024, "height": 1024, "steps": 50, "seed": 0, "cfg": 4}
POST /jobs              the same, answered with an id; GET /jobs/ID/events tells the progress, GET /jobs/ID/ours.png the picture
GET  /metrics, /health  for Prometheus, and for whoever starts it again
"""

import argparse
import asyncio
import contextlib
import json
import queue
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from worker import Job, Limits, Refused, Worker

import qwen_fast
from qwen_fast import demo

KEPT = 64  # finished jobs whose pictures can still be fetched
QUIET = 15.0  # seconds after which a listener gets a sign of life
RETRY = 1000  # milliseconds after which a page whose connection was lost asks again
# Between two looks at a job. No thread waits for one: there are few, and /health has to answer when many requests wait.
LOOK = 0.01


class Asked(BaseModel):
    """The body of a request; sizes and steps that are left out are the service's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    negative_prompt: str = " "
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int = 0
    cfg: float = 4.0
    compare: bool = False


def make_app(pipe: Any, *, defaults: dict[str, int], limits: Limits | None = None) -> FastAPI:
    """The service for one enabled pipeline.

    Args:
        defaults: width, height and steps of a request that names none.
    """
    worker, jobs = Worker(pipe, limits), OrderedDict()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title="qwen_fast", lifespan=lifespan)

    def submitted(asked: Asked) -> Job:
        given = asked.model_dump()
        job = Job(**{name: defaults[name] if value is None else value for name, value in given.items()})
        worker.submit(job)
        return job

    def kept(job_id: str) -> Job:
        if job_id not in jobs:
            raise Refused(404, f"there is no job {job_id}; the last {KEPT} are kept.")
        return jobs[job_id]

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status, {"Retry-After": "5"} if error.status == 503 else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return JSONResponse({"error": f"`{where}`: {first['msg']}."}, 422)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    @app.get("/defaults")
    async def settings() -> dict[str, int]:
        return defaults

    @app.post("/pictures")
    async def picture(asked: Asked, request: Request) -> Response:
        job = submitted(asked)
        while not job.done.is_set():
            job.left = await request.is_disconnected()
            await asyncio.sleep(LOOK)
        if job.status != 200:
            return JSONResponse(job.outcome, job.status)
        headers = {f"X-{name.replace('_', '-').title()}": str(value) for name, value in job.outcome.items()}
        return Response(job.pictures["ours"], media_type="image/png", headers=headers)

    @app.post("/jobs", status_code=202)
    async def begin(asked: Asked) -> dict[str, str]:
        # Not a number: nobody finds another's, also where a page asks again after the service was started again.
        job, job_id = submitted(asked), secrets.token_hex(8)
        jobs[job_id] = job
        for old in [one for one, other in jobs.items() if other.done.is_set()][: max(0, len(jobs) - KEPT)]:
            del jobs[old]
        return {"id": job_id}

    @app.get("/jobs/{job_id}/events")
    async def events(job_id: str) -> StreamingResponse:
        job = kept(job_id)

        async def told() -> AsyncIterator[str]:
            yield f"retry: {RETRY}\n\n"
            said = time.monotonic()
            while True:
                over = job.done.is_set()  # asked first: the last event is there then
                try:
                    event = job.events.get_nowait()
                except queue.Empty:
                    if not over:
                        if time.monotonic() - said > QUIET:
                            said = time.monotonic()
                            yield ": waiting\n\n"
                        await asyncio.sleep(LOOK)
                        continue
                    event = {"event": "done" if job.status == 200 else "failed", **job.outcome}  # somebody else has heard it
                name = event.pop("event")
                yield f"event: {name}\ndata: {json.dumps(event)}\n\n"
                if name != "progress":
                    return

        return StreamingResponse(told(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/jobs/{job_id}/{name}.png")
    async def drawn(job_id: str, name: str) -> Response:
        job = kept(job_id)
        if name not in job.pictures:
            raise Refused(404, f"job {job_id} has no {name}.png; it has {', '.join(job.pictures) or 'none yet'}.")
        return Response(job.pictures[name], media_type="image/png")

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(worker.metrics())

    @app.get("/health")
    async def health() -> PlainTextResponse:
        return PlainTextResponse("ok" if worker.alive else "the worker is gone", 200 if worker.alive else 503)

    app.state.worker = worker
    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id (default: the demo's)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--warmup", action="append", default=[], metavar="WxH", help="sizes to prepare; repeat it")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(options.model or str(demo.CHECKPOINT), dtype=dtype, device=device)
    sizes = [tuple(map(int, size.split("x"))) for size in options.warmup]
    if sizes:
        for one in qwen_fast.warmup(pipe, sizes, negative_prompt=" ", true_cfg_scale=4.0):
            print(f"{one.width}x{one.height}: first call {one.first:.1f} s, later {one.later:.2f} s", flush=True)
    side, steps = (64, 20) if options.model is None else (1024, 50)
    app = make_app(pipe, defaults={"width": side, "height": side, "steps": steps}, limits=Limits(batch=options.max_batch))

    class Server(uvicorn.Server):
        def handle_exit(self, *signalled: Any) -> None:
            app.state.worker.close()  # before uvicorn waits for the answers of those who wait themselves
            super().handle_exit(*signalled)

    with contextlib.suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, host=options.host, port=options.port)).run()


if __name__ == "__main__":
    main()
