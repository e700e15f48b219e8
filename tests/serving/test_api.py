"""The HTTP interface as clients see it: OpenAI's client, vLLM's dialect, errors, metrics."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.loopback_server import running
from vlm.export.drawings import drawn_picture
from vlm.runtime import open_bundle


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return open_bundle(clip_bundle, threads=1)


@pytest.fixture(scope="module")
def address(bundle):
    with running(bundle) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def picture():
    return drawn_picture(70, 41, 5)


@pytest.fixture(scope="module")
def uri(picture):
    return data_uri(picture)


def data_uri(picture, kind="PNG", mime="image/png"):
    out = io.BytesIO()
    picture.save(out, kind)
    return f"data:{mime};base64,{base64.b64encode(out.getvalue()).decode()}"


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_openai_client_embeds_texts_in_both_encodings(client, bundle):
    texts = ["a red circle", "x", "Grüße 你好"]
    wanted = bundle.encode_text(texts)
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(model="clip", input=texts, encoding_format=encoding)
        rows = [d.embedding for d in answer.data]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(r), "<f4") if isinstance(r, str) else r for r in rows]
        assert np.abs(np.asarray(rows) - wanted).max() < 1e-6
        assert [d.index for d in answer.data] == [0, 1, 2]
    assert client.embeddings.create(model="clip", input="x").data[0].embedding == pytest.approx(wanted[1].tolist(), abs=1e-6)
    assert answer.usage.prompt_tokens == sum(bundle.count_tokens(t) for t in texts)


def test_openai_client_embeds_pictures_and_texts_together(client, bundle, picture, uri):
    given = [image(uri), {"type": "text", "text": "x"}, "plain", {"type": "image_url", "image_url": uri}]
    rows = np.asarray([d.embedding for d in client.embeddings.create(model="clip", input=given).data])
    expected = bundle.encode_image([picture])[0]
    assert np.abs(rows[0] - expected).max() < 1e-6
    assert np.abs(rows[3] - expected).max() < 1e-6
    assert np.abs(rows[1:3] - bundle.encode_text(["x", "plain"])).max() < 1e-6


def test_other_dialects_give_the_same_vector(address, bundle, picture, uri):
    wanted = bundle.encode_image([picture])[0]
    bodies = [
        {"messages": [{"role": "user", "content": [image(uri)]}]},
        {"input": uri, "modality": "image"},
        {"input": [uri], "modality": "image", "model": "clip", "dimensions": 24, "user": "me"},
        {"input": image(uri)},
    ]
    for body in bodies:
        answer = httpx.post(f"{address}/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        assert np.abs(np.asarray(answer.json()["data"][0]["embedding"]) - wanted).max() < 1e-6
    text = {"messages": [{"role": "user", "content": "x"}]}
    row = httpx.post(f"{address}/v1/embeddings", json=text).json()["data"][0]["embedding"]
    assert np.abs(np.asarray(row) - bundle.encode_text(["x"])[0]).max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "mime"), [("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif"), ("BMP", "application/octet-stream")]
)
def test_pictures_of_every_format(address, picture, kind, mime):
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": [image(data_uri(picture, kind, mime))]})
    assert answer.status_code == 200, answer.text


def test_classify_scores_labels(address, bundle, picture, uri):
    labels = ["red circle", "blue square", "nothing"]
    for given in (uri, image(uri), {"url": uri}):
        body = {"image": given, "labels": labels, "template": "a photo of a {}"}
        answer = httpx.post(f"{address}/v1/classify", json=body).json()
        wanted = bundle.score([picture], [f"a photo of a {label}" for label in labels])[0]
        found = {entry["label"]: entry for entry in answer["data"]}
        assert [found[label]["score"] for label in labels] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert sum(entry["probability"] for entry in answer["data"]) == pytest.approx(1, abs=1e-5)
        assert answer["data"] == sorted(answer["data"], key=lambda entry: -entry["score"])
        assert [labels[entry["index"]] for entry in answer["data"]] == [entry["label"] for entry in answer["data"]]


def test_models_health_and_schema(address, client):
    assert [model.id for model in client.models.list()] == ["clip"]
    for path in ("/health/live", "/health/ready", "/health"):
        assert httpx.get(address + path).status_code == 200
    schema = httpx.get(f"{address}/openapi.json").json()
    assert {"/v1/embeddings", "/v1/classify", "/v1/models", "/health/live", "/health/ready", "/metrics"} == set(schema["paths"])


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({}, 400, "input", "exactly one of input and messages"),
        ({"input": "x", "messages": []}, 400, "input", "exactly one"),
        ({"input": ""}, 400, "input", "empty"),
        ({"input": []}, 400, "input", "nothing to embed"),
        ({"input": ["a", ""]}, 400, "input.1", "empty"),
        ({"input": ["a"] * 257}, 400, "input", "at most 256"),
        ({"input": ["a"] * 5000}, 400, "input", "at most 4096"),
        ({"input": "a" * 20_001}, 400, "input", "20001 characters"),
        ({"input": [1, 2, 3]}, 400, "input.0", "token ids"),
        ({"input": [[1, 2, 3]]}, 400, "input.0", "token ids"),
        ({"input": "x", "model": "other"}, 404, "model", "'clip' is"),
        ({"input": "x", "dimensions": 8}, 400, "dimensions", "24 numbers"),
        ({"input": "x", "dimensions": 0}, 400, "dimensions", "greater than 0"),
        ({"input": "x", "encoding_format": "hex"}, 400, "encoding_format", "float"),
        ({"input": "x", "inptu": 1}, 400, "inptu", "did you mean 'input'"),
        ({"input": [{"type": "image_url"}]}, 400, "input.0.image_url", "required"),
        ({"input": [{"type": "video", "video": "x"}]}, 400, "input.0", "image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            400, "messages", "2 content",
        ),
        ({"input": [image("data:image/png;base64,@@@@")]}, 400, "input.0", "base64"),
        ({"input": [image("data:image/png,abc")]}, 400, "input.0", "base64"),
        ({"input": [image("data:image/svg+xml;base64,AAAA")]}, 415, "input.0", "image/svg"),
        ({"input": [image("data:image/png;base64,AAAA")]}, 422, "input.0", "not_a_picture"),
        ({"input": [image("data:image/png;base64,")]}, 422, "input.0", "empty"),
    ],
)  # fmt: skip
def test_wrong_requests_get_one_clear_error(address, body, status, param, says):
    answer = httpx.post(f"{address}/v1/embeddings", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"input": "\\ud800"}', b'{"input": %s}' % (b"9" * 5000), b'{"input": NaN}'],
)
def test_bodies_that_are_no_request(address, raw):
    answer = httpx.post(f"{address}/v1/embeddings", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_wrong_classifications(address, uri):
    for body, status in [
        ({"image": uri, "labels": []}, 400),
        ({"image": uri, "labels": ["a", ""]}, 400),
        ({"image": uri, "labels": ["a"], "template": "no place"}, 400),
        ({"image": uri, "labels": ["a"] * 1001}, 400),
        ({"image": "http://localhost/x.png", "labels": ["a"]}, 400),
        ({"labels": ["a"]}, 400),
    ]:
        assert httpx.post(f"{address}/v1/classify", json=body).status_code == status


def test_unknown_paths_and_methods(address):
    for method, path, status, says in (
        ("GET", "/v1/nothing", 404, "/openapi.json lists"),
        ("GET", "/v1/embeddings", 405, "takes POST"),
        ("GET", "/docs", 404, "no such route"),
    ):
        answer = httpx.request(method, address + path)
        assert answer.status_code == status
        assert says in answer.json()["error"]["message"]


def test_metrics_parse_and_add_up(bundle, uri):
    with running(bundle) as address:
        for i in range(3):
            httpx.post(f"{address}/v1/embeddings", json={"input": [f"text {i}", image(uri)]})
        httpx.post(f"{address}/v1/embeddings", json={"input": ""})
        httpx.get(f"{address}/no/such/path/{'x' * 50}")
        families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{address}/metrics").text)}
    counts = {(s.labels["route"], s.labels["code"]): s.value for s in families["vlm_requests"].samples if s.name.endswith("_total")}
    assert counts["/v1/embeddings", "200"] == 3
    assert counts["/v1/embeddings", "400"] == 1
    assert counts["other", "404"] == 1
    sizes = {s.labels["kind"]: s.value for s in families["vlm_batch_size"].samples if s.name.endswith("_sum")}
    assert sizes == {"text": 3, "image": 3}
    stages = {s.labels["stage"] for s in families["vlm_stage_seconds"].samples}
    assert stages == {"decode", "queue", "model", "encode"}
    assert {"vlm_request_seconds", "vlm_queue_depth", "vlm_inflight", "vlm_rejected", "process_resident_memory_bytes"} <= set(families)


def test_key_guards_every_route_but_health(bundle):
    with running(bundle, api_keys=("secret-key", "other-key")) as address:
        paths = [("GET", p) for p in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/health/../metrics")]
        for method, path in [*paths, ("POST", "/v1/embeddings"), ("POST", "/v1/classify")]:
            for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": "Basic secret-key"}, {"authorization": "Bearer"}):
                answer = httpx.request(method, address + path, headers=headers)
                assert answer.status_code == 401, (path, headers)
                assert answer.json()["error"]["type"] == "authentication_error"
        for path in ("/health", "/health/live", "/health/ready"):
            assert httpx.get(address + path).status_code == 200
        for key in ("secret-key", "other-key"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                assert len(client.embeddings.create(model="clip", input="x").data[0].embedding) == 24


def test_a_torch_model_is_served_alike(bundle, clip_model, picture, uri):
    from vlm.evaluation.encoder import open_model

    with running(open_model(clip_model), name="mine") as address:
        answer = httpx.post(f"{address}/v1/embeddings", json={"input": [image(uri), "x"], "model": "mine"})
        assert answer.status_code == 200, answer.text
        rows = np.asarray([d["embedding"] for d in answer.json()["data"]])
        wanted = np.concatenate([bundle.encode_image([picture]), bundle.encode_text(["x"])])
        assert (rows * wanted).sum(1).min() > 0.9999
        bad = {"input": [image("data:image/png;base64,AAAA")]}
        assert httpx.post(f"{address}/v1/embeddings", json=bad).status_code == 422
