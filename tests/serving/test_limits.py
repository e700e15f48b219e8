"""What an attacker may not do: reach other hosts, exhaust memory, hold connections, stop the server."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest

from tests.serving.loopback_server import running
from vlm.runtime import open_bundle


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return open_bundle(clip_bundle, threads=1)


@pytest.fixture(scope="module")
def address(bundle):
    with running(bundle, body_seconds=1.0) as address:
        yield address


@pytest.fixture
def listener():
    """A server on loopback that counts who comes."""
    hits: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.05)
    stop = threading.Event()

    def listen():
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            hits.append(connection.recv(100))
            connection.close()

    thread = threading.Thread(target=listen)
    thread.start()
    yield server.getsockname()[1], hits
    stop.set()
    thread.join()
    server.close()


def memory() -> int:
    """Resident bytes of this process, in which the server runs."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def healthy(address: str) -> bool:
    return httpx.post(f"{address}/v1/embeddings", json={"input": "x"}).status_code == 200


def test_no_url_is_ever_fetched(address, listener):
    port, hits = listener
    urls = [
        f"http://127.0.0.1:{port}/x.png", f"http://[::1]:{port}/x.png", f"http://0.0.0.0:{port}/", f"http://2130706433:{port}/",
        f"http://0177.0.0.1:{port}/", f"http://0x7f.1:{port}/", f"http://localhost.:{port}/", f"http://[::ffff:127.0.0.1]:{port}/",
        f"http://example.com@127.0.0.1:{port}/", f"HTTP://127.0.0.1:{port}/", f" http://127.0.0.1:{port}/", f"//127.0.0.1:{port}/",
        "http://169.254.169.254/latest/meta-data", "file:///etc/hostname", "/etc/hostname", f"gopher://127.0.0.1:{port}/_x",
        f"ftp://127.0.0.1:{port}/x", f"https://127.0.0.1:{port}/x", "data:text/html;base64,PGh0bWw+", f"data://127.0.0.1:{port}/x.png",
    ]  # fmt: skip
    with httpx.Client(base_url=f"{address}/v1") as client:
        for url in urls:
            part = {"type": "image_url", "image_url": {"url": url}}
            for path, body in (
                ("embeddings", {"input": [part]}),
                ("embeddings", {"input": url, "modality": "image"}),
                ("embeddings", {"messages": [{"role": "user", "content": [part]}]}),
                ("classify", {"image": url, "labels": ["a"]}),
            ):
                answer = client.post(f"/{path}", json=body)
                assert answer.status_code in (400, 415), (url, answer.text)
                message = answer.json()["error"]["message"]
                assert url[:5].lower() == "data:" or "fetches nothing" in message
    time.sleep(0.1)
    assert hits == []
    # The listener does notice a visit.
    with socket.create_connection(("127.0.0.1", port)) as visit:
        visit.sendall(b"x")
    time.sleep(0.2)
    assert hits == [b"x"]


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    press = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(press.compress(row * 100) for _ in range(side // 100)) + press.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_from_its_header(address):
    data = bomb(30_000)
    assert len(data) < 150_000
    before = memory()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": [{"type": "image_url", "image_url": {"url": url}}]})
    assert answer.status_code == 413
    assert "too_many_pixels" in answer.json()["error"]["message"]
    assert memory() - before < 50e6
    assert healthy(address)


def test_stated_gigabyte_is_refused_without_reading(address):
    with raw(address) as (send, receive):
        send(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n")
        answer = receive()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert healthy(address)


def test_endless_body_is_cut_at_the_limit(address):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 20
            yield b" " * (1 << 20)

    before = memory()
    try:
        answer = httpx.post(f"{address}/v1/embeddings", content=endless(), timeout=20)
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # the server closed before it had taken everything, and the client saw that first
    assert sent < 200 << 20
    assert memory() - before < 250e6
    assert healthy(address)


def test_all_bodies_together_are_bounded(bundle):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 30000\r\n\r\n"
    with running(bundle, max_held_bytes=50_000) as address:
        with raw(address) as (send, receive), raw(address) as (send_too, receive_too):
            send(head + b" " * 29_999)
            time.sleep(0.3)
            send_too(head + b" " * 29_999)
            assert receive_too().startswith(b"HTTP/1.1 429 ")
            send(b" ")
            assert receive(2000).startswith(b"HTTP/1.1 400 ")
        assert all(healthy(address) for _ in range(3))  # what was held is given back
        assert httpx.post(f"{address}/v1/embeddings", content=b" " * 49_000).status_code == 415


def test_slow_body_times_out(address):
    with raw(address) as (send, receive):
        send(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        start = time.monotonic()
        answer = receive()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.5 < time.monotonic() - start < 5
    assert healthy(address)


def test_short_and_lying_lengths_hurt_no_one(address):
    with raw(address) as (send, _):
        send(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{}")
    for header in (b"Content-Length: -1", b"Content-Length: x", b"Content-Length: " + b"9" * 400):
        with raw(address) as (send, receive):
            send(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n{}")
            assert receive()[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"")
    assert healthy(address)


def test_compressed_bodies_are_refused(address):
    answer = httpx.post(f"{address}/v1/embeddings", content=zlib.compress(b"{}"), headers={"content-encoding": "deflate"})
    assert answer.status_code == 415


def test_picture_limits_are_settings(bundle):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(bomb(200)).decode()}}
    for settings, status in (({}, 200), ({"max_pixels": 39_999}, 413), ({"max_picture_bytes": 40}, 413), ({"max_body_bytes": 50}, 413)):
        with running(bundle, **settings) as address:
            answer = httpx.post(f"{address}/v1/embeddings", json={"input": [part]})
            assert answer.status_code == status, answer.text


def test_many_empty_entries_cost_no_memory(address):
    body = json.dumps({"input": [{}] * 1_000_000})
    before = memory()
    answer = httpx.post(f"{address}/v1/embeddings", content=body, timeout=30, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "4096" in answer.json()["error"]["message"]
    assert memory() - before < 300e6


class raw:
    """A bare connection: (send, receive until closed)."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)

    def __enter__(self):
        return self.socket.sendall, self._receive

    def __exit__(self, *_) -> None:
        self.socket.close()

    def _receive(self, most: int = 1 << 20) -> bytes:
        """Until the server closes; or its first bytes, when less is asked for."""
        out = b""
        try:
            while block := self.socket.recv(min(most, 65536)):
                out += block
                if most < 65536:
                    break
        except ConnectionResetError:
            pass
        return out


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def closed_after(connection, limit=8.0):
    """Seconds until the server closes a connection, all that it says read."""
    begun = time.monotonic()
    connection.settimeout(limit)
    while connection.recv(65536):
        pass
    return time.monotonic() - begun


def refused_after(connection, part, pause=0.0, limit=10.0):
    """Seconds until the server takes no more of what is sent again and again."""
    begun = time.monotonic()
    connection.settimeout(limit)
    while time.monotonic() - begun < limit:
        try:
            connection.sendall(part)
        except (ConnectionError, TimeoutError):
            break
        time.sleep(pause)
    return time.monotonic() - begun


def test_connections_that_send_nothing_or_half_of_their_headers_are_closed(bundle):
    with running(bundle, header_seconds=0.6) as address:
        with socket.create_connection(("127.0.0.1", port_of(address))) as silent:
            assert 0.3 < closed_after(silent) < 5
        with socket.create_connection(("127.0.0.1", port_of(address))) as slow:
            assert refused_after(slow, b"G", pause=0.1) < 5  # a byte now and then keeps nothing open
        with socket.create_connection(("127.0.0.1", port_of(address))) as second:
            second.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in second.recv(65536)
            second.sendall(b"GET /health/live HT")  # the next request on the same connection
            assert 0.3 < closed_after(second) < 5
        assert healthy(address)


def test_an_answer_that_nobody_reads_is_cut(bundle):
    with running(bundle, write_seconds=0.6) as address:
        with socket.create_connection(("127.0.0.1", port_of(address))) as greedy:
            greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            assert refused_after(greedy, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50) < 8
        assert healthy(address)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:1", "127.0.0.1:80", "[::1]:8000", "10.0.0.7", "::1"])
def test_addresses_and_localhost_are_known_hosts(address, host):
    assert httpx.get(f"{address}/health/live", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[x]:1"])
def test_a_page_that_was_turned_to_this_address_reaches_nothing(address, host):
    for path in ("/health/live", "/v1/models"):
        answer = httpx.get(f"{address}{path}", headers={"Host": host})
        assert answer.status_code == 421
        assert answer.json()["error"]["code"] == "unknown_host"
    assert httpx.post(f"{address}/v1/embeddings", headers={"Host": host}, json={"input": "x"}).status_code == 421


def test_names_that_are_allowed_are_known():
    from starlette.testclient import TestClient

    from vlm.serving.hosts import KnownHosts

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    client = TestClient(KnownHosts(app, ("Box.example", "127.0.0.1")))
    for host, status in (("box.EXAMPLE:80", 200), ("box.example.", 200), ("other.example", 421)):
        assert client.get("/", headers={"Host": host}).status_code == status
