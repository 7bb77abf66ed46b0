"""FastAPI as most people write it first: `python -m bench.peers.naive_app MODEL PORT`.

Each request has one run of its own, in the framework's pool of threads; ONNX Runtime is left to its own
choices, which spread a run over all cores.
"""

import sys

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from bench.pipeline import Pipeline

app = FastAPI()
pipeline = Pipeline(sys.argv[1])


def answer(data: bytes) -> dict:
    """Decode one image and run it."""
    return pipeline.answers([pipeline.decode(data)])[0]


@app.post("/predict")
async def predict(request: Request) -> dict:
    """Answer for the image in the body."""
    return await run_in_threadpool(answer, await request.body())


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
