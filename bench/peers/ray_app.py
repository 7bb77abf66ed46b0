"""Ray Serve: `python -m bench.peers.ray_app MODEL PORT`.

Through its proxy a request costs five milliseconds of CPU, so its flags for throughput are on: the replica
takes HTTP itself. There is one, with a thread for each core (two would need a balancer), no log of
requests, and room for more of them than its default of five, which starves batches.
"""

import asyncio
import os
import sys
import tempfile
import time

os.environ |= {  # read by Ray as it is imported, here and in the processes that it starts
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": sys.argv[2],
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(int(sys.argv[2]) + 1),
    "RAY_USAGE_STATS_ENABLED": "0",
}
import ray
from ray import serve
from starlette.requests import Request

CORES = len(os.sched_getaffinity(0))


@serve.deployment(
    max_ongoing_requests=2048,
    ray_actor_options={"num_cpus": CORES},
    logging_config={"enable_access_log": False},
)
class App:
    """Decodes and runs in the replica, whole batches in threads."""

    def __init__(self, model: str) -> None:
        """Load the network."""
        from bench.pipeline import Pipeline  # noqa: PLC0415 - in the replica, not the driver

        self.pipeline = Pipeline(model, threads=1)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0, max_concurrent_batches=CORES)
    async def answers(self, bodies: list[bytes]) -> list[dict]:
        """Return the answers of a batch."""
        return await asyncio.to_thread(self.run, bodies)

    def run(self, bodies: list[bytes]) -> list[dict]:
        """Decode and run, on a thread."""
        return self.pipeline.answers([self.pipeline.decode(data) for data in bodies])

    async def __call__(self, request: Request) -> dict:
        """Answer for the image in the body."""
        return await self.answers(await request.body())


if __name__ == "__main__":
    ray.init(
        num_cpus=CORES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        object_store_memory=100 * 2**20,
        _temp_dir=tempfile.gettempdir(),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": 0})
    serve.run(App.bind(sys.argv[1]), route_prefix="/predict")
    while True:
        time.sleep(3600)
