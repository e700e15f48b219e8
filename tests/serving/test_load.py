"""Many clients at a time: nothing lost, nothing mixed up, nothing done for nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np

from tests.serving.loopback_server import running
from tests.serving.slow_embedder import SlowEmbedder, vector


def test_answers_are_never_lost_or_mixed():
    embedder = SlowEmbedder()

    async def one(client, i):
        texts = [f"{i}-{j}" for j in range(1 + i % 3)]
        answer = await client.post("/v1/embeddings", json={"input": texts})
        assert answer.status_code == 200, answer.text
        rows = np.asarray([d["embedding"] for d in answer.json()["data"]])
        assert np.abs(rows - np.stack([vector(t) for t in texts])).max() < 1e-6

    async def all_of_them(address):
        limits = httpx.Limits(max_connections=48)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
            await asyncio.gather(*(one(client, i) for i in range(200)))

    with running(embedder) as address:
        asyncio.run(all_of_them(address))
    sizes = [len(call) for call in embedder.calls]
    assert sum(sizes) == sum(1 + i % 3 for i in range(200))
    assert max(sizes) <= 32
    assert len(sizes) < sum(sizes)  # some calls served several requests


def test_full_queue_answers_429_and_then_recovers():
    embedder = SlowEmbedder()
    with running(embedder, queue_items=4, max_batch=1, batch_wait_seconds=0) as address:
        embedder.gate.clear()
        with ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(httpx.post, f"{address}/v1/embeddings", json={"input": f"t{i}"}, timeout=30) for i in range(12)]
            until(lambda: sum(f.done() for f in waiting) >= 6)
            embedder.gate.set()
            answers = [f.result() for f in waiting]
        codes = sorted(a.status_code for a in answers)
        assert set(codes) == {200, 429}
        refused = next(a for a in answers if a.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        assert httpx.post(f"{address}/v1/embeddings", json={"input": "x"}).status_code == 200


def test_too_many_requests_at_a_time_answer_429():
    embedder = SlowEmbedder()
    with running(embedder, max_requests=2) as address:
        embedder.gate.clear()
        with ThreadPoolExecutor(5) as pool:
            waiting = [pool.submit(httpx.post, f"{address}/v1/embeddings", json={"input": "x"}, timeout=30) for _ in range(5)]
            until(lambda: sum(f.done() for f in waiting) == 3)
            assert httpx.get(f"{address}/health/live").status_code == 200
            embedder.gate.set()
            assert sorted(f.result().status_code for f in waiting) == [200, 200, 429, 429, 429]


def test_deadline_answers_504():
    embedder = SlowEmbedder()
    with running(embedder, deadline_seconds=0.3) as address:
        embedder.gate.clear()
        start = time.monotonic()
        answer = httpx.post(f"{address}/v1/embeddings", json={"input": "x"}, timeout=30)
        assert answer.status_code == 504
        assert time.monotonic() - start < 5
        embedder.gate.set()
        assert httpx.post(f"{address}/v1/embeddings", json={"input": "x"}).status_code == 200


def test_work_of_a_client_that_left_is_dropped():
    embedder = SlowEmbedder()
    with running(embedder, max_batch=1, batch_wait_seconds=0) as address:
        embedder.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(httpx.post, f"{address}/v1/embeddings", json={"input": "first"}, timeout=30)
            until(lambda: embedder.calls)
            try:
                httpx.post(f"{address}/v1/embeddings", json={"input": ["left"] * 50}, timeout=0.3)
                raise AssertionError("expected the client to give up")
            except httpx.ReadTimeout:
                pass
            time.sleep(0.2)
            embedder.gate.set()
            assert first.result().status_code == 200
        assert httpx.post(f"{address}/v1/embeddings", json={"input": "after"}).status_code == 200
        assert embedder.calls == [["first"], ["after"]]
        assert 'vlm_rejected_total{reason="dropped"} 50.0' in httpx.get(f"{address}/metrics").text


def test_stopping_finishes_what_runs():
    embedder = SlowEmbedder()
    with ThreadPoolExecutor(1) as pool:
        with running(embedder) as address:
            embedder.gate.clear()
            answer = pool.submit(httpx.post, f"{address}/v1/embeddings", json={"input": "x"}, timeout=30)
            until(lambda: embedder.calls)
            threading.Timer(0.5, embedder.gate.set).start()
        assert answer.result().status_code == 200


def test_a_failing_model_answers_500_and_tells_nothing():
    class Broken(SlowEmbedder):
        def encode_text(self, texts):
            raise RuntimeError("/secret/path")

    with running(Broken()) as address:
        answer = httpx.post(f"{address}/v1/embeddings", json={"input": ["x", "y"]})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert httpx.get(f"{address}/health/live").status_code == 200


def test_failing_self_test_is_never_ready():
    class Wrong(SlowEmbedder):
        def self_test(self):
            raise ValueError("golden vectors differ")

    with running(Wrong(), ready=False) as address:
        until(lambda: httpx.get(f"{address}/health/ready").json() == {"status": "failed"})
        assert httpx.get(f"{address}/health/ready").status_code == 503
        assert httpx.post(f"{address}/v1/embeddings", json={"input": "x"}).status_code == 503


def test_command_serves_without_torch_and_sigterm_drains(clip_bundle):
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from vlm.cli.main import run\n"
        f"sys.argv = ['vlm', 'serve', {str(clip_bundle)!r}, '--port', '0', '--threads', '1']\n"
        "run()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert line.startswith("serving clip on http://127.0.0.1:"), line + process.stderr.read()
        address = line.split()[-1]
        until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        answers = []
        body = {"input": [f"text number {i}" for i in range(256)]}
        client = threading.Thread(target=lambda: answers.append(httpx.post(f"{address}/v1/embeddings", json=body, timeout=30).status_code))
        client.start()
        until(lambda: answers or "vlm_inflight 2.0" in httpx.get(f"{address}/metrics").text)
        os.kill(process.pid, signal.SIGTERM)
        client.join(30)
        assert answers == [200]
        assert process.wait(20) in (0, -signal.SIGTERM, 143)
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.communicate()


def until(condition, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
