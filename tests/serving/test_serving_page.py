"""docs/serving.md: its examples run as they stand, and its table of limits is the settings'."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.export.drawings import drawn_picture
from vlm.serving import ServerSettings
from vlm.serving.server import bind

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text("utf-8")
BLOCKS = dict(re.findall(r"^<!-- ci: (\w+) -->\n```\w+\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))
DEFAULT = "127.0.0.1:8000"


def test_the_table_names_every_limit_with_its_default_and_option():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| `\w+` \| [\d.]+ \|", line)]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    fields = {name: str(field.default) for name, field in ServerSettings.model_fields.items() if name != "name"}
    assert {row[0]: row[1] for row in rows} == fields
    from vlm.cli.serve import command

    options = {option for parameter in command.params for option in parameter.opts}
    assert {row[2] for row in rows if row[2]} <= options


@pytest.fixture(scope="module")
def place(clip_bundle, tmp_path_factory):
    """A folder with bundle/, picture.png and a server started by the page's own command, on a free port."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "bundle").symlink_to(clip_bundle)
    drawn_picture(70, 41, 5).save(folder / "picture.png")
    with bind("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
    assert BLOCKS["serve"].startswith("vlm serve ")
    words = BLOCKS["serve"].replace("--port 8000", f"--port {port} --threads 1").split()[1:]
    process = subprocess.Popen([sys.executable, "-m", "vlm", *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert line.startswith("serving clip on "), line + process.stderr.read()
        yield folder, f"127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM, 143)
    finally:
        process.kill()
        process.communicate()


def run(place, name: str, *command: str) -> str:
    folder, address = place
    text = BLOCKS[name].replace(DEFAULT, address)
    assert address in text
    done = subprocess.run([*command, text], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@needs_curl
def test_curl_examples(place):
    decoder = json.JSONDecoder()
    text, answers = run(place, "curl", "bash", "-euo", "pipefail", "-c"), []
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].lstrip()
    assert answers[0] == {"status": "ready"}
    assert answers[1]["data"][0]["id"] == "clip"
    assert [len(answer["data"]) for answer in answers[2:]] == [2, 1, 2]
    assert {entry["label"] for entry in answers[4]["data"]} == {"red circle", "blue square"}


def test_openai_example(place):
    numbers = [float(x) for x in run(place, "openai", sys.executable, "-c").strip().strip("[]").split()]
    assert len(numbers) == 2
    assert all(-1 <= x <= 1 for x in numbers)


@needs_curl
def test_error_example_is_answered_as_written(place):
    written = re.search(r"^```json\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    assert written is not None
    assert json.loads(run(place, "error", "bash", "-c")) == json.loads(written[1])
