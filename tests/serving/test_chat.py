"""POST /v1/chat/completions as clients see it: OpenAI's client, streams, limits, batches, disconnects."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.answering_fixtures import bundle_of, torch_of
from tests.serving.loopback_server import running
from tests.serving.slow_generator import SlowGenerator
from vlm.export.drawings import drawn_picture
from vlm.runtime import open_bundle
from vlm.runtime.chat import Message, PicturePart
from vlm.runtime.generation import Decoding, generate

NAME = "answer-prefix"


@pytest.fixture(scope="module")
def address():
    with running(bundle_of("prefix")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        yield client


def png(picture=None):
    out = io.BytesIO()
    (picture or drawn_picture(40, 30, 2)).save(out, "PNG")
    return out.getvalue()


def image(data=None, url=None):
    return {"type": "image_url", "image_url": {"url": url or "data:image/png;base64," + base64.b64encode(data or png()).decode()}}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return [{"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}]


def expected(content, pictures=(), generator=None, **settings):
    generator = generator or bundle_of("prefix")
    prompt = generator.prompt([Message("user", content)], [generator.prepare_image(p) for p in pictures])
    return generate(generator, [prompt], Decoding(**settings))[0], generator.positions(prompt)


def test_a_plain_answer(client):
    answer = client.chat.completions.create(model=NAME, messages=user("a red circle"), max_tokens=7, temperature=0)
    wanted, positions = expected(("a red circle",), max_new_tokens=7)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert (answer.object, answer.model, answer.choices[0].message.role) == ("chat.completion", NAME, "assistant")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (positions, len(wanted.ids), positions + len(wanted.ids))


def test_pictures_stand_where_they_were_sent(client):
    parts = text("first "), image(), text(" then "), image(png(drawn_picture(9, 50, 3))), text("?")
    answer = client.chat.completions.create(model=NAME, messages=user(*parts), max_completion_tokens=6, temperature=0)
    wanted, positions = expected(
        ("first ", PicturePart(), " then ", PicturePart(), "?"), [png(), png(drawn_picture(9, 50, 3))], max_new_tokens=6
    )
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage.prompt_tokens == positions


def test_a_stream_says_the_same_in_pieces(client):
    given = dict(model=NAME, messages=user(image(), text("a star")), max_tokens=8, temperature=0)
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    assert all(c.object == "chat.completion.chunk" for c in chunks)


def test_null_is_read_as_left_out(address):
    nothing = dict.fromkeys(("max_completion_tokens", "temperature", "top_p", "top_k", "stop", "n", "stream", "stream_options",
                             "presence_penalty", "frequency_penalty", "logprobs", "user", "model"))  # fmt: skip
    body = {"messages": user("a"), "max_tokens": 4, "seed": 5}
    bare, full = (httpx.post(f"{address}/v1/chat/completions", json=body | more).json() for more in ({}, nothing))
    assert full["choices"] == bare["choices"]
    assert refused(address, body | {"messages": None})[0] == 400
    assert refused(address, body | {"no_such_field": None})[0] == 400


def test_usage_of_a_stream_is_null_until_its_end_where_it_was_asked_for(address):
    body = {"messages": user("x"), "max_tokens": 3, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    events = [line.removeprefix("data: ") for line in httpx.post(f"{address}/v1/chat/completions", json=body).text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 3


def test_a_stream_ends_with_done(address):
    body = {"messages": user("x"), "max_tokens": 2, "temperature": 0, "stream": True}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_seeds_stop_texts_and_earlier_turns(client):
    def ask(messages=None, **given):
        answer = client.chat.completions.create(model=NAME, messages=messages or user("a"), max_tokens=10, **given)
        return answer.choices[0].message.content

    assert ask(seed=3, temperature=2) == ask(seed=3, temperature=2) != ask(seed=4, temperature=2)
    assert len({ask(temperature=2) for _ in range(3)}) > 1
    whole = ask(temperature=0)
    stop = next(c for c in whole if c.isascii() and c.isprintable())
    assert ask(temperature=0, stop=[stop, "never"]) == ask(temperature=0, stop=stop) == whole[: whole.index(stop)]
    turns = [{"role": "system", "content": "s"}, *user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    ours = bundle_of("prefix")
    prompt = ours.prompt([Message("system", ("s",)), Message("user", ("a",)), Message("assistant", ("b",)), Message("user", ("c",))])
    assert ask(turns, temperature=0) == generate(ours, [prompt], Decoding(max_new_tokens=10))[0].text


def refused(address, body, **more):
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=20, **more)
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"messages": user(image(url="http://127.0.0.1:1/x.png"))}, 400, "remote_fetch_refused"),
        ({"messages": user(image(url="file:///etc/passwd"))}, 400, "remote_fetch_refused"),
        ({"messages": user(image(url="/etc/passwd"))}, 400, "remote_fetch_refused"),
        ({"messages": user(image(b"<html>"))}, 422, "not_a_picture"),
        ({"messages": user(image(url="data:text/html;base64,AAAA"))}, 415, "media_type"),
        ({"messages": user(image(url="data:image/png;base64,A"))}, 400, "bad_base64"),
        ({"messages": user("x " * 200)}, 400, "context_length_exceeded"),
        ({"max_tokens": 159}, 400, "context_length_exceeded"),
        ({"messages": user(*[image()] * 17)}, 400, "too_many_items"),
        ({"messages": user("x" * 20_001)}, 400, "text_too_long"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "bad_messages"),
        ({"messages": [{"role": "system", "content": [image()]}, *user("x")]}, 400, "bad_messages"),
        ({"messages": []}, 400, "invalid_request"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request"),
        ({"max_tokens": 0}, 400, "invalid_request"),
        ({"temperature": -1}, 400, "invalid_request"),
        ({"n": 2}, 400, "invalid_request"),
        ({"stop": [""]}, 400, "invalid_request"),
        ({"logprobs": True}, 400, "invalid_request"),
        ({"tools": []}, 400, "invalid_request"),
        ({"model": "other"}, 404, "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_refused_before_any_work(address, change, status, code, stream):
    got, error = refused(address, {"messages": user("x"), "max_tokens": 3, "stream": stream} | change)
    assert (got, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}


def test_pictures_are_bounded_before_they_are_decoded():
    with running(bundle_of("prefix"), max_picture_bytes=2000, max_pixels=5000, max_pictures=2, max_body_bytes=20_000) as address:
        for content, status, code in (
            (user(image(png(drawn_picture(100, 90, 1)))), 413, "picture_too_large"),
            (user(image(flat(90, 90))), 413, "too_many_pixels"),
            (user(*[image(flat(8, 8))] * 3), 400, "too_many_items"),
            (user("x" * 20_000), 413, "body_too_large"),
        ):
            got, error = refused(address, {"messages": content, "max_tokens": 1})
            assert (got, error["code"]) == (status, code)


def test_pictures_that_do_not_fit_are_not_prepared():
    slow = SlowGenerator(bundle_of("prefix"))
    with running(slow, max_pictures=64) as address:
        status, error = refused(address, {"messages": user(*[image()] * 60), "max_tokens": 1})
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert slow.prepared == 1


def flat(width, height):
    from PIL import Image

    return png(Image.new("RGB", (width, height), (200, 30, 30)))


def test_routes_of_the_other_kind_say_what_is_served(address, clip_bundle):
    for path in ("/v1/embeddings", "/v1/classify"):
        answer = httpx.post(f"{address}{path}", json={"input": "x"})
        assert answer.status_code == 404
        assert "it writes: POST /v1/chat/completions" in answer.json()["error"]["message"]
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert "/v1/embeddings" not in paths
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == NAME
    with running(open_bundle(clip_bundle, threads=1)) as other:
        status, error = refused(other, {"messages": user("x")})
        assert status == 404
        assert "it embeds: POST /v1/embeddings" in error["message"]
        assert "/v1/chat/completions" not in httpx.get(f"{other}/openapi.json").json()["paths"]


def test_an_api_key_guards_the_route():
    with running(bundle_of("prefix"), api_keys=("secret-key",)) as address:
        assert refused(address, {"messages": user("x")})[0] == 401
        key = {"Authorization": "Bearer secret-key"}
        body = {"messages": user("x"), "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=body, headers=key).status_code == 200


def in_thread(call):
    out = []
    thread = threading.Thread(target=lambda: out.append(call()))
    thread.start()
    return thread, out


def wait_for(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def post(address, words, **more):
    body = {"messages": user(words), "max_tokens": 5, "temperature": 0} | more
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)


def test_requests_that_wait_together_start_together():
    slow = SlowGenerator(bundle_of("prefix"))
    slow.gate.clear()
    with running(slow, batch_wait_seconds=0) as address:
        words = ["a red circle", "x", "a star on a house"]
        first, _ = in_thread(lambda: post(address, "first"))
        wait_for(lambda: slow.starts == [1])
        calls = [in_thread(lambda w=w: post(address, w)) for w in words]
        other, late = in_thread(lambda: post(address, "other settings", max_tokens=2))
        metrics = lambda: httpx.get(f"{address}/metrics").text  # noqa: E731
        wait_for(lambda: "vlm_queue_depth 4.0" in metrics())
        slow.gate.set()
        for thread in (first, other, *[thread for thread, _ in calls]):
            thread.join(30)
        assert slow.starts == [1, 4]  # whatever their settings
        forbid = tuple(slow.eos_ids)
        for (_, out), w in zip(calls, words):
            assert out[0].json()["choices"][0]["message"]["content"] == expected((w,), max_new_tokens=5, forbidden=forbid)[0].text
        assert late[0].json()["usage"]["completion_tokens"] == 2
        families = {f.name: f for f in text_string_to_metric_families(metrics())}
        assert families["vlm_generated_tokens"].samples[0].value == 4 * 5 + 2
        counts = [s.value for s in families["vlm_time_to_first_token_seconds"].samples if s.name.endswith("_count")]
        assert counts == [5]


def test_one_that_comes_later_joins_what_is_being_written():
    slow = SlowGenerator(bundle_of("prefix"), seconds=0.02)
    with running(slow, batch_wait_seconds=0) as address:
        long, whole = in_thread(lambda: post(address, "a red circle", max_tokens=80))
        wait_for(lambda: len(slow.advances) > 4)
        late = post(address, "x", max_tokens=4, temperature=1.5, seed=3)
        assert not whole, "the first answer is still being written"
        long.join(30)
        assert slow.starts == [1, 1]
        assert set(slow.advances) == {1, 2}
        assert len(slow.advances) == 79
        forbid = tuple(slow.eos_ids)
        alone = expected(("a red circle",), max_new_tokens=80, forbidden=forbid)[0].text
        assert whole[0].json()["choices"][0]["message"]["content"] == alone
        assert post(address, "x", max_tokens=4, temperature=1.5, seed=3).json()["choices"] == late.json()["choices"]


def test_two_at_once_with_pictures_and_seeds(client):
    given = dict(model=NAME, messages=user(image(), text("a")), max_tokens=6, temperature=1.5)
    alone = [client.chat.completions.create(**given, seed=seed).choices[0].message.content for seed in (1, 2)]
    calls = [in_thread(lambda s=s: client.chat.completions.create(**given, seed=s).choices[0].message.content) for s in (1, 2)]
    for thread, _ in calls:
        thread.join(30)
    assert [out[0] for _, out in calls] == alone


def test_a_full_queue_and_a_passed_deadline_are_told():
    slow = SlowGenerator(bundle_of("prefix"))
    slow.gate.clear()
    with running(slow, queue_answers=1, deadline_seconds=1.5, batch_wait_seconds=0) as address:
        first = in_thread(lambda: post(address, "first"))
        wait_for(lambda: slow.starts == [1])
        second = in_thread(lambda: post(address, "second"))
        wait_for(lambda: "vlm_queue_depth 1.0" in httpx.get(f"{address}/metrics").text)
        status, error = refused(address, {"messages": user("third")})
        assert (status, error["code"]) == (429, "queue_full")
        for thread, out in (first, second):
            thread.join(30)
            assert (out[0].status_code, out[0].json()["error"]["code"]) == (504, "deadline")
        slow.gate.set()
        assert post(address, "again").status_code == 200


def test_a_stream_past_its_deadline_ends_with_an_error_event():
    slow = SlowGenerator(bundle_of("prefix"), seconds=0.2)
    with running(slow, deadline_seconds=0.7) as address:
        events = [line for line in post(address, "x", stream=True, max_tokens=50).text.split("\n\n") if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline"
        assert len(events) > 2
        wait_for(lambda: stopped(slow))


def stopped(slow):
    before = len(slow.advances)
    time.sleep(0.5)
    return len(slow.advances) == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(stream):
    slow = SlowGenerator(bundle_of("prefix"), seconds=0.02)
    with running(slow) as address:
        body = {"messages": user("x"), "max_tokens": 100, "temperature": 0, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.4)
        wait_for(lambda: stopped(slow))
        assert len(slow.advances) < 90
        assert post(address, "again").status_code == 200


def test_a_client_that_leaves_a_batch_frees_its_row():
    slow = SlowGenerator(bundle_of("prefix"), seconds=0.02)
    slow.gate.clear()
    with running(slow, batch_wait_seconds=0) as address:
        first = in_thread(lambda: post(address, "first", max_tokens=1))
        wait_for(lambda: slow.starts == [1])
        stays = in_thread(lambda: post(address, "stays", max_tokens=60))
        body = {"messages": user("leaves"), "max_tokens": 60, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            wait_for(lambda: "vlm_queue_depth 2.0" in httpx.get(f"{address}/metrics").text)
            slow.gate.set()
            written = (line for line in answer.iter_lines() if line and '"content": ""' not in line)
            next(written)  # of the prompt alone; the role came before it, with an empty text
            next(written)
        for thread, _ in (first, stays):
            thread.join(30)
        assert slow.starts == [1, 2]
        assert stays[1][0].json()["usage"]["completion_tokens"] == 60
        assert slow.advances[0] == 2
        assert slow.advances[-1] == 1


def test_a_client_that_leaves_before_the_first_event_ends_its_answer():
    slow = SlowGenerator(bundle_of("prefix"), seconds=0.02)
    with running(slow) as address:
        body = json.dumps({"messages": user("x"), "max_tokens": 100, "temperature": 0, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as connection:
                connection.sendall(head.encode() + body)
        wait_for(lambda: stopped(slow))
        assert sum(slow.advances) < 200
        assert post(address, "again").status_code == 200


def test_a_torch_model_is_served_alike(client):
    with running(torch_of("prefix")) as address:
        body = {"messages": user(text("a star"), image()), "max_tokens": 6, "temperature": 0}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30).json()
    ours = client.chat.completions.create(model=NAME, messages=body["messages"], max_tokens=6, temperature=0)
    assert answer["choices"][0]["message"]["content"] == ours.choices[0].message.content


def test_serve_command_drains_after_sigterm(prefix_bundle):
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm", "serve", str(prefix_bundle), "--port", "0", "--threads", "1"], stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        assert "serving answer-prefix on" in line
        address = line.split()[-1]
        wait_for(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        body = {"messages": user("x"), "max_tokens": 100, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
