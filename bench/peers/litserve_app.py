"""LitServe: `python -m bench.peers.litserve_app MODEL PORT`.

As its documentation advises for a CPU: a worker process for each core, here with one compute thread each.
Batches gather for a moment only; without any window its workers would spin. The raw body is taken by FastAPI,
which is cheaper than the form that its examples use.
"""

import os
import sys
from typing import Annotated

import litserve
from fastapi import Body

from bench.pipeline import Pipeline


class Api(litserve.LitAPI):
    """Decodes and runs in the workers."""

    def setup(self, device):  # noqa: ARG002 - its signature
        """Load the network, once a worker."""
        self.pipeline = Pipeline(sys.argv[1], threads=1)

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]):
        """Return pixels."""
        return self.pipeline.decode(request)

    def batch(self, inputs):
        """Leave it to the pipeline, which stacks."""
        return inputs

    def predict(self, images):
        """Return the batch's answers."""
        return self.pipeline.answers(images)

    def unbatch(self, output):
        """Answers are a list already."""
        return output

    def encode_response(self, output):
        """An answer is JSON already."""
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(max_batch_size=16, batch_timeout=0.002),
        accelerator="cpu",
        workers_per_device=len(os.sched_getaffinity(0)),
        fast_queue=True,
        timeout=120,
    )
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
