"""Ray Serve: `python -m bench.peers.ray_app MODEL PORT`.

A replica for each core with one compute thread each, batches without a window, and room for more requests in flight than
its default of five, which would starve them. Plain HTTP in, without FastAPI.
"""

import os
import sys
import tempfile
import time

import ray
from ray import serve
from starlette.requests import Request

CORES = len(os.sched_getaffinity(0))


@serve.deployment(num_replicas=CORES, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1})
class App:
    """Decodes and runs in the replicas."""

    def __init__(self, model: str) -> None:
        """Load the network, once a replica."""
        from bench.pipeline import Pipeline  # in the replica, not in the driver

        self.pipeline = Pipeline(model, threads=1)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0)
    async def answers(self, bodies: list[bytes]) -> list[dict]:
        """Return the answers of a batch."""
        return self.pipeline.answers([self.pipeline.decode(data) for data in bodies])

    async def __call__(self, request: Request) -> dict:
        """Answer for the image in the body."""
        return await self.answers(await request.body())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=CORES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=100 * 2**20,
            _temp_dir=folder,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
        serve.run(App.bind(sys.argv[1]), route_prefix="/predict")
        while True:
            time.sleep(3600)
