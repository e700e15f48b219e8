"""Every answer of every route is one that /openapi.json documents, whatever is sent."""

from __future__ import annotations

import base64
import io
import json

import httpx
import pytest

from tests.serving.loopback_server import running
from vlm.export.drawings import drawn_picture
from vlm.runtime import open_bundle
from vlm.serving.schemas import EVERY_ERROR, ErrorResponse

WRONG = [None, True, 0, -1, 1.5, 2**70, "", "x", "\0", "\U0010ffff", [], [[]], [None], {}, {"type": "image_url"}, [{"type": 3}], "data:,"]
"""Values that some field of a request does not take."""

RAW = [
    b"", b"{", b"[]", b"null", b'"x"', b"1e999", b"NaN", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"[" * 20_000, b'{"input": "\\ud800"}',
    b'{"input": "x", "input": 3}', b'{"a":' * 9_000, b'{"input": 1' + b"0" * 5_000 + b"}", b"\x1f\x8b\x08\x00", b"a=b&c=d",
]  # fmt: skip

TYPES = [
    None, "application/json", "application/json; charset=utf-16", "text/plain", "application/xml", "multipart/form-data; boundary=x",
    "é/\x01",
]


def pictures() -> list[str]:
    """Addresses and data URIs of which none is a good picture."""
    out = io.BytesIO()
    drawn_picture(9, 7, 1).save(out, "PNG")
    good = base64.b64encode(out.getvalue()).decode()
    return [
        "", "data:", "data:,", "data:;base64,", "data:image/png", "data:image/png,x", f"data:image/png;base32,{good}",
        f"data:image/svg+xml;base64,{good}",
        f"data:text/html;base64,{good}", "data:image/png;base64,", "data:image/png;base64,A", "data:image/png;base64,====",
        "data:image/png;base64,Ø",
        f"data:image/png;base64,{good[:-9]}", f"data:image/png;base64,{good[:40]}", f"data:image/png;base64, {good}",
        f"data:image/png;base64,{good}!",
        "data:image/png;base64," + base64.b64encode(b"<html>").decode(), "http://127.0.0.1/x.png", "file:///etc/passwd",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def client(clip_bundle):
    with running(open_bundle(clip_bundle, threads=1)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


def check(document: dict, method: str, answer: httpx.Response) -> None:
    """The answer's status, media type and form are documented, and it is no fault of the server's."""
    said = document["paths"][answer.url.path][method]["responses"]
    assert str(answer.status_code) in said, (answer.status_code, answer.request.content[:200])
    assert answer.status_code < 500, answer.text
    media = answer.headers["content-type"].partition(";")[0]
    assert media in said[str(answer.status_code)]["content"]
    if answer.status_code >= 400:
        error = ErrorResponse.model_validate_json(answer.content, strict=True).error
        assert error.message
        assert len(answer.content) < 1500


def bodies(document: dict, path: str) -> list[dict]:
    """A body for each field of the route's schema and each wrong value, with the other required fields as they should be."""
    name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    right = {"input": "x"} if path == "/v1/embeddings" else {"image": "data:image/png;base64,AAAA", "labels": ["a"]}
    assert set(schema.get("required", [])) <= set(right)
    out = [{key: value for key, value in right.items() if key != left} for left in right] + [right | {"unknown": 1}]
    out += [right | {field: value} for field in schema["properties"] for value in WRONG]
    for url in pictures():
        part = {"type": "image_url", "image_url": {"url": url}}
        asked = [{"input": [part]}, {"messages": [{"role": "user", "content": [part]}]}]
        out += [{"image": url, "labels": ["a"]}] if "image" in right else asked
    return out


def test_the_document_names_every_error_of_a_route_with_a_body(document):
    posts = [path for path, routes in document["paths"].items() if "post" in routes]
    assert len(posts) >= 2
    for path in posts:
        assert set(document["paths"][path]["post"]["responses"]) == {"200", *map(str, EVERY_ERROR)}


def test_routes_without_a_body_answer_as_documented(client, document):
    gets = [path for path, routes in document["paths"].items() if "get" in routes]
    assert len(gets) >= 4
    for path in gets:
        for suffix in ("", "?x=1&x=%00", "?" + "y" * 2000):
            answer = client.get(path + suffix)
            check(document, "get", answer)
            assert answer.status_code == 200


def test_malformed_fields_get_documented_answers(client, document):
    sent = 0
    for path, routes in document["paths"].items():
        for body in bodies(document, path) if "post" in routes else []:
            check(document, "post", client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"}))
            sent += 1
    assert sent > 200


def test_malformed_bodies_and_media_types_get_documented_answers(client, document):
    for path, routes in document["paths"].items():
        for raw in RAW if "post" in routes else []:
            for media in TYPES:
                headers = {} if media is None else {"content-type": media.encode("utf-8")}
                try:
                    answer = client.post(path, content=raw, headers=headers)
                except httpx.LocalProtocolError:  # the client itself refuses such a header
                    continue
                check(document, "post", answer)
                assert answer.status_code == (400 if media is not None and media.startswith("application/json") else 415), (raw[:50], media)


def test_other_media_types_are_refused_by_name(client):
    answer = client.post("/v1/embeddings", content=b'{"input": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_other_methods_say_what_is_allowed(client, document):
    for path, routes in document["paths"].items():
        for method in {"get", "post", "put", "delete", "patch"} - set(routes):
            answer = client.request(method, path)
            assert answer.status_code == 405
            assert answer.headers["allow"] == ", ".join(sorted(route.upper() for route in routes))
