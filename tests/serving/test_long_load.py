"""A server process under 64 clients and 5,000 requests: nothing lost, nothing mixed, nothing leaked, a clean end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from vlm.export.drawings import drawn_picture
from vlm.runtime import open_bundle

pytestmark = pytest.mark.long

CLIENTS, REQUESTS, WARM_UP = 64, 5_000, 1_500


class Server:
    """`vlm serve` of a bundle in a process of its own."""

    def __init__(self, bundle: Path, *options: str) -> None:
        words = ["serve", str(bundle), "--port", "0", "--threads", "1", "--name", "tiny", *options]
        self.process = subprocess.Popen([sys.executable, "-m", "vlm", *words], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("serving tiny on "), line
        self.address = line.split()[-1]
        until(lambda: httpx.get(f"{self.address}/health/ready").status_code == 200)

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{self.address}/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    server = Server(bundle, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def known(clip_bundle) -> list[tuple[dict, np.ndarray]]:
    """40 requests of one or two pictures and a text each, with the vectors that the bundle gives for them here."""
    bundle = open_bundle(clip_bundle, threads=1)
    out = []
    for i in range(40):
        pictures = [drawn_picture(20 + 7 * i % 61, 16 + 11 * i % 53, 100 * i + j) for j in range(1 + i % 2)]
        text = f"picture number {i}"
        wanted = np.concatenate([bundle.encode_image(pictures), bundle.encode_text([text])])
        parts: list[object] = [{"type": "image_url", "image_url": {"url": uri(picture)}} for picture in pictures]
        out.append(({"input": [*parts, text]}, wanted))
    return out


def uri(picture) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_5000_requests_of_64_clients_are_answered_right_and_leak_nothing(clip_bundle, known):
    vectors = np.concatenate([wanted for _, wanted in known])
    likeness = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert likeness.max() < 1 - 1e-5  # a mixed answer would be seen
    seconds: list[float] = []
    memory: list[tuple[int, int]] = []

    async def client(http: httpx.AsyncClient, server: Server, numbers: Iterator[int]) -> None:
        for number in numbers:
            body, wanted = known[number % len(known)]
            started = time.perf_counter()
            answer = await http.post("/v1/embeddings", json=body)
            seconds.append(time.perf_counter() - started)
            assert answer.status_code == 200, answer.text
            rows = np.asarray([entry["embedding"] for entry in answer.json()["data"]])
            assert rows.shape == wanted.shape
            assert np.abs(rows - wanted).max() < 1e-5, number
            if len(seconds) % 250 == 0:
                memory.append((len(seconds), server.memory()))

    async def everyone(server: Server) -> None:
        numbers = iter(range(REQUESTS))
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=server.address, limits=limits, timeout=60) as http:
            await asyncio.gather(*(client(http, server, numbers) for _ in range(CLIENTS)))

    with serving(clip_bundle) as server:
        started = time.perf_counter()
        asyncio.run(everyone(server))
        total = time.perf_counter() - started
        assert len(seconds) == REQUESTS
        assert server.metric('vlm_requests_total{code="200",route="/v1/embeddings"}') == REQUESTS
        assert server.metric("vlm_queue_depth") == 0
    p50, p99 = np.percentile(seconds, [50, 99])
    late = [(count, size) for count, size in memory if count >= WARM_UP]
    slope = np.polyfit([count for count, _ in late], [size for _, size in late], 1)[0]
    print(
        f"\n{REQUESTS} requests, {CLIENTS} clients: {REQUESTS / total:.0f} a second, p50 {p50 * 1e3:.0f} ms, "
        f"p99 {p99 * 1e3:.0f} ms; resident "
        f"{memory[0][1] / 2**20:.1f} MiB at {memory[0][0]}, {late[0][1] / 2**20:.1f} at {late[0][0]}, "
        f"{late[-1][1] / 2**20:.1f} at {late[-1][0]}, "
        f"slope {slope:.0f} bytes a request"
    )
    assert slope < 1024
    assert late[-1][1] - late[0][1] < 4 * 2**20


def test_a_full_server_refuses_and_recovers(clip_bundle, known):
    async def burst(address: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as http:
            return await asyncio.gather(*(http.post("/v1/embeddings", json=known[i % len(known)][0]) for i in range(400)))

    with serving(clip_bundle, "--max-requests", "8") as server:
        answers = asyncio.run(burst(server.address))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        for i, answer in enumerate(answers):
            if answer.status_code == 200:
                rows = np.asarray([entry["embedding"] for entry in answer.json()["data"]])
                assert np.abs(rows - known[i % len(known)][1]).max() < 1e-5
        assert httpx.post(f"{server.address}/v1/embeddings", json=known[0][0]).status_code == 200


def test_clients_that_leave_drop_their_queued_work(clip_bundle):
    body = {"input": ["a rather long text about nothing at all " * 100] * 256}
    dropped = 'vlm_rejected_total{reason="dropped"}'

    async def leave(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            posts = [asyncio.ensure_future(http.post("/v1/embeddings", json=body)) for _ in range(6)]
            await asyncio.sleep(0.3)
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)

    with serving(clip_bundle, "--max-batch", "1") as server:
        for _ in range(20):
            asyncio.run(leave(server.address))
            until(lambda: server.metric("vlm_queue_depth") == 0)
            if server.metric(dropped):
                break
        assert server.metric(dropped) > 0
        assert httpx.post(f"{server.address}/v1/embeddings", json={"input": "x"}).status_code == 200


def test_sigterm_finishes_what_runs_and_takes_nothing_new(clip_bundle):
    body = {"input": [f"text number {i} " * 50 for i in range(256)]}

    async def stop(server: Server) -> list[int]:
        async with httpx.AsyncClient(base_url=server.address, timeout=60) as http:
            posts = [asyncio.ensure_future(http.post("/v1/embeddings", json=body)) for _ in range(4)]
            async with httpx.AsyncClient(base_url=server.address, timeout=60) as other:
                while "vlm_inflight 5.0" not in (await other.get("/metrics")).text:
                    assert not any(post.done() for post in posts), "too fast to be seen running"
            server.process.send_signal(signal.SIGTERM)
            return [(await post).status_code for post in posts]

    with serving(clip_bundle, "--max-batch", "1") as server:
        assert asyncio.run(stop(server)) == [200] * 4
        assert server.process.wait(20) in (0, -signal.SIGTERM, 143)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.address}/health/live")
