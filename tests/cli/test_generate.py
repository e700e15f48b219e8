"""`vlm generate`: one answer, JSON, lines in and out, every kind of model."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.answering_fixtures import bundle_of, tokenizer, torch_of
from tests.bundle_fixtures import exported
from vlm.cli.generate import _printable, asked_of, read_request
from vlm.cli.main import main
from vlm.config.errors import DataError
from vlm.export.drawings import drawn_picture
from vlm.models import load_model
from vlm.runtime.chat import Message, PicturePart
from vlm.runtime.generation import Contrast, Decoding, generate
from vlm.runtime.pictures import decode_picture


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    drawn_picture(40, 30, 2).save(path)
    return path


def uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def run(monkeypatch, capsys, args, stdin=b""):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = main(["generate", *map(str, args)])
    return code, *capsys.readouterr()


def answer_of(generator, text, pictures=(), **settings):
    prompt = generator.prompt([Message("user", (text,))], [generator.prepare_image(p) for p in pictures])
    answer = generate(generator, [prompt], Decoding(**settings), negatives=generator.negatives)[0]
    return answer, generator.positions(prompt)


def test_a_bundle_and_a_run_print_the_answer(monkeypatch, capsys, prefix_bundle, prefix_model, picture):
    for model, generator in ((prefix_bundle, bundle_of("prefix")), (prefix_model.parent, torch_of("prefix"))):
        wanted, _ = answer_of(generator, "a red circle", [picture, picture], max_new_tokens=9)
        args = [model, "--image", picture, "--image", picture, "--prompt", "a red circle", "--max-new-tokens", 9]
        code, out, err = run(monkeypatch, capsys, args)
        assert (code, err) == (0, "")
        assert out == wanted.text.encode("utf-8", "replace").decode() + "\n"


def test_json_is_one_object(monkeypatch, capsys, prefix_bundle, picture):
    wanted, positions = answer_of(bundle_of("prefix"), "x", [picture], max_new_tokens=5)
    code, out, _ = run(monkeypatch, capsys, [prefix_bundle, "--image", picture, "--prompt", "x", "--max-new-tokens", 5, "--json"])
    assert code == 0
    assert json.loads(out) == {
        "text": wanted.text,
        "ids": list(wanted.ids),
        "finish_reason": wanted.finish_reason,
        "prompt_tokens": positions,
        "completion_tokens": len(wanted.ids),
    }


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--beams", 3], dict(strategy="beam", beams=3)),
        (["--contrast", 0.5], dict(contrast=Contrast(alpha=0.5))),
        (["--temperature", 0], dict(strategy="sample", temperature=0)),
    ],
)
def test_settings_of_decoding_reach_the_loop(monkeypatch, capsys, prefix_bundle, picture, options, settings):
    wanted, _ = answer_of(bundle_of("prefix"), "a star", [picture], max_new_tokens=6, **settings)
    args = [prefix_bundle, "--image", picture, "--prompt", "a star", "--max-new-tokens", 6, "--json", *options]
    assert json.loads(run(monkeypatch, capsys, args)[1])["ids"] == list(wanted.ids)


def test_draws_hang_on_the_seed_and_stop_texts_end(monkeypatch, capsys, prefix_bundle, picture):
    def ids(*more):
        args = [prefix_bundle, "--image", picture, "--prompt", "a", "--max-new-tokens", 8, "--json", *more]
        return json.loads(run(monkeypatch, capsys, args)[1])

    drawn = [ids("--temperature", 2, "--top-k", 50, "--top-p", 0.99, "--seed", seed)["ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = ids()["text"]
    stop = next(c for c in whole if c.isascii() and c.isprintable())
    assert ids("--stop", stop)["text"] == whole[: whole.index(stop)]


def test_lines_are_answered_in_order_with_errors_as_lines(monkeypatch, capsys, prefix_bundle, picture):
    broken = picture.parent / "page.png"
    broken.write_text("<html>")
    parts = [{"type": "image_url", "image_url": {"url": uri(picture)}}, {"type": "text", "text": "a star"}]
    requests = [
        {"image": str(picture), "prompt": "a red circle"},
        {"image": [uri(picture), str(picture)], "prompt": "first <image>, then <image>?", "id": 7},
        {"prompt": "no picture"},
        {"image": str(broken), "prompt": "x"},
        {"image": "http://127.0.0.1/x.png", "prompt": "x"},
        {"prompt": "word " * 200},
        {"messages": [{"role": "user", "content": parts}]},
        "not json",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
        {"prompt": "x", "colour": 1},
        {"prompt": "x", "image": 3, "id": "a wrong one too"},
    ]
    lines = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in requests).encode()
    args = [prefix_bundle, "--jsonl", "-", "--max-new-tokens", 6, "--batch-size"]
    code, out, err = run(monkeypatch, capsys, [*args, 4], lines)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert "6 of 11" in err
    assert ["error" in row for row in rows] == [False, False, False, True, True, True, False, True, False, True, True]
    for number, says in ((3, "not_a_picture"), (4, "nothing is fetched"), (5, "positions"), (7, "not JSON"), (9, "colour")):
        assert says in rows[number]["error"]
    assert rows[3]["error"].startswith(str(broken))
    assert [row.get("id") for row in rows] == [None, 7, *[None] * 8, "a wrong one too"]
    ours = bundle_of("prefix")
    assert rows[0]["ids"] == list(answer_of(ours, "a red circle", [picture], max_new_tokens=6)[0].ids)
    assert rows[6]["ids"] == list(answer_of(ours, "a star", [picture], max_new_tokens=6)[0].ids)
    assert rows[1]["prompt_tokens"] - rows[0]["prompt_tokens"] > 3
    again = run(monkeypatch, capsys, [*args, 1], lines)[1]
    assert again == out


def test_requests_are_read_strictly():
    messages, pictures = asked_of(read_request(b'{"prompt": "a <image> b", "image": "x.png"}'))
    assert messages[0].content == ("a ", PicturePart(), " b")
    assert pictures == ["x.png"]
    assert asked_of(read_request(b'{"prompt": "an <image> tag"}'))[0][0].content == ("an <image> tag",)
    for line, says in (
        (b"[1]", "JSON object"),
        (b"{}", "exactly one"),
        (b'{"prompt": 1}', "no text"),
        (b'{"prompt": "x", "image": 3}', "no path"),
        (b'{"prompt": "x", "image": "data:image/png,AA"}', "base64"),
        (b'{"prompt": "x", "image": "data:image/png;base64,A"}', "not valid base64"),
        (b'{"messages": []}', "no list"),
        (b'{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "messages.0"),
        (b"[" * 100_000, "not JSON"),
    ):
        with pytest.raises(DataError, match=says):
            asked_of(read_request(line))


def test_wrong_requests_are_refused(monkeypatch, capsys, clip_bundle, clip_model, prefix_bundle, picture, tmp_path):
    language = exported("language")[0]
    for args, code, says in (
        ([clip_bundle, "--prompt", "x"], 2, "a dual encoder writes nothing"),
        ([clip_model, "--prompt", "x"], 2, "a dual encoder writes nothing"),
        ([prefix_bundle], 2, "exactly one of --prompt and --jsonl"),
        ([prefix_bundle, "--prompt", "x", "--jsonl", "-"], 2, "exactly one"),
        ([prefix_bundle, "--jsonl", "-", "--image", picture], 2, "--image goes with --prompt"),
        ([prefix_bundle, "--prompt", "x", "--beams", 2, "--temperature", 1], 2, "beam search draws nothing"),
        ([prefix_bundle, "--prompt", "x", "--image", tmp_path / "none.png"], 3, "none.png"),
        ([prefix_bundle, "--prompt", "x", "--template", "vicunna"], 2, "did you mean 'vicuna'"),
        ([prefix_bundle, "--prompt", "x", "--max-new-tokens", 500], 2, "max_new_tokens at most"),
        ([language, "--prompt", "x", "--contrast", 1], 2, "reads no pictures"),
        ([language, "--prompt", "x", "--image", picture], 2, "reads no pictures"),
        ([tmp_path / "none", "--prompt", "x"], 3, "no such model"),
    ):
        got, out, err = run(monkeypatch, capsys, args)
        assert (got, out) == (code, ""), err
        assert says in err


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_published_language_model_continues_a_text(monkeypatch, capsys, tmp_path, kind):
    config, family = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    theirs = family(config(**shape, vocab_size=330, bos_token_id=2, eos_token_id=1, pad_token_id=0)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer().save(tmp_path)
    code, out, err = run(monkeypatch, capsys, [tmp_path, "--prompt", "a red", "--max-new-tokens", 7, "--json"])
    assert code == 0, err
    prompt = [2, *tokenizer().ids(["a red"], add_special=False)[0], *tokenizer().ids(["\n"], add_special=False)[0]]
    with torch.no_grad():
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False)[0, len(prompt) :].tolist()
    assert json.loads(out)["ids"] == [token for token in wanted if token != 1]


@pytest.fixture
def llava(tmp_path):
    """A published LLaVA directory with a tokenizer that knows its placeholder, and the model in transformers."""
    torch.manual_seed(0)
    image_id = tokenizer().token_to_id("<image>")
    text = LlamaConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       vocab_size=tokenizer().vocab_size, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
    theirs = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path / "llava")
    tokenizer().save(tmp_path / "llava")
    return tmp_path / "llava", theirs, image_id


def test_a_published_llava_answers_as_in_transformers(monkeypatch, capsys, llava, picture):
    directory, theirs, image_id = llava
    args = [directory, "--image", picture, "--prompt", "a red circle", "--max-new-tokens", 7, "--template", "plain", "--json"]
    code, out, err = run(monkeypatch, capsys, args)
    assert code == 0, err
    words = [token for text in ("a red circle", "\n") for token in tokenizer().ids([text], add_special=False)[0]]
    ids = torch.tensor([[2, *[image_id] * 4, *words]])
    ours = load_model(directory)
    pixels = ours.preprocess().to_array(decode_picture(str(picture)))
    with torch.no_grad():
        normal = ours.pixel_norms["main"](torch.from_numpy(pixels)[None])
        wanted = theirs.generate(input_ids=ids, pixel_values=normal, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :].tolist()
    assert json.loads(out)["ids"] == [token for token in wanted if token != 1]


@pytest.mark.long
def test_a_published_llava_becomes_a_bundle_that_answers_alike(monkeypatch, capsys, llava, picture, tmp_path):
    directory, _, _ = llava
    assert main(["export", str(directory), "--output", str(tmp_path / "bundle")]) == 0
    capsys.readouterr()
    given = ["--image", picture, "--prompt", "a star", "--max-new-tokens", 7, "--json"]
    answers = [json.loads(run(monkeypatch, capsys, [model, *given])[1]) for model in (directory, tmp_path / "bundle")]
    assert answers[0] == answers[1]


def test_a_bundle_answers_where_torch_cannot_be_imported(prefix_bundle, picture):
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from vlm.cli.main import run\n"
        f"sys.argv = ['vlm', 'generate', {str(prefix_bundle)!r}, '--image', {str(picture)!r}, '--prompt', 'x', '--json']\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ids"] == list(answer_of(bundle_of("prefix"), "x", [picture])[0].ids)


def test_a_terminal_gets_the_text_as_it_comes_without_control_characters(monkeypatch, prefix_bundle):
    class Terminal(io.StringIO):
        flushed = 0

        def isatty(self):
            return True

        def flush(self):
            self.flushed += 1

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", str(prefix_bundle), "--prompt", "a red circle", "--max-new-tokens", "30"]) == 0
    wanted = answer_of(bundle_of("prefix"), "a red circle", max_new_tokens=30)[0].text
    assert _printable("a\x1b[2J\x07b\tc\n") == "a[2Jb\tc\n"
    assert terminal.getvalue() == "".join(c for c in wanted if c.isprintable() or c in "\n\t") + "\n"
    assert terminal.flushed > 3


def test_the_prompt_may_come_from_stdin(monkeypatch, capsys, prefix_bundle):
    given = run(monkeypatch, capsys, [prefix_bundle, "--prompt", "a star", "--json"])[1]
    assert run(monkeypatch, capsys, [prefix_bundle, "--prompt", "-", "--json"], b"a star\n")[1] == given
