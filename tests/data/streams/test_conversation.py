"""Conversation streams: roles, supervision, pictures and placeholders, cutting, several pictures, workers."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.data.data_makers import WORDS, sample, write_shards
from tests.data.talk_makers import IMAGE_ID, PRE, TOKENIZER, loader_of, talk, write_talks
from vlm.config.errors import DataError
from vlm.data import DataOptions, Tokenizer, build_loader, open_source, source_texts
from vlm.data.corruption import corrupt
from vlm.data.streams.conversation import Conversations
from vlm.data.streams.options import ConversationStream, Questions
from vlm.runtime.pictures import decode_picture
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.templates import TEMPLATES
from vlm.types import Role

TALK = {"text": {"kind": "conversation"}}


def decoded(stream, row, keep=None):
    chosen = stream.mask[row] if keep is None else stream.mask[row] & keep[row]
    return TOKENIZER.decode(stream.values[row][chosen].tolist(), skip_special=False)


def equal(one, two):
    assert list(one.keys) == list(two.keys)
    assert set(one) == set(two)
    for name in one:
        for field in ("values", "mask", "sample_index", "slot", "role", "supervised", "segment", "position"):
            left, right = getattr(one[name], field, None), getattr(two[name], field, None)
            assert (left is None) == (right is None), (name, field)
            assert left is None or torch.equal(left, right), (name, field)


def test_a_conversation_has_its_roles_answers_and_picture(tmp_path):
    uri = write_talks(tmp_path, [talk(n, turns=2) for n in range(6)])
    with loader_of(uri, TALK, template=TEMPLATES["vicuna"], text={"length": 400}) as loader:
        batch = next(loader)
    text, image = batch["text"], batch["image"]
    assert image.values.shape == (6, 3, 16, 16)
    assert image.sample_index.tolist() == list(range(6))
    assert image.slot.tolist() == [0] * 6
    for row, key in enumerate(batch.keys):
        n = int(key.rpartition(":")[2]) - 1
        first, second = f"a {WORDS[n % 10]} thing number {n}", f"a {WORDS[(n + 1) % 10]} thing number {n}"
        whole = decoded(text, row)
        assert whole.endswith(f"USER: <image>\nwhat is thing 0? ASSISTANT: {first}</s>USER: what is thing 1? ASSISTANT: {second}</s>")
        assert decoded(text, row, text.supervised) == f" {first}</s> {second}</s>"
        assert decoded(text, row, text.role == Role.INSTRUCTION) == "what is thing 0?what is thing 1?"
        assert (text.values[row] == IMAGE_ID).sum() == 1
        assert torch.equal(text.role[row] == Role.ANSWER, text.supervised[row])
        assert text.values[row, 0] == TOKENIZER.bos_id
        expected = PRE.to_array(decode_picture(tmp_path / f"{n % 12}.png"))
        assert np.array_equal(image.values[row].numpy(), expected)
    lengths = text.mask.sum(1)
    assert all(text.mask[i, : lengths[i]].all() for i in range(6))
    assert text.values.shape[1] == lengths.max()


def test_the_table_names_the_template_before_the_model(tmp_path):
    uri = write_talks(tmp_path, [talk(n) for n in range(6)])
    with loader_of(uri, TALK, template=TEMPLATES["vicuna"], text={"length": 64, "template": "plain"}) as loader:
        batch = next(loader)
    assert decoded(batch["text"], 0).startswith("<s><image>what is thing 0?\na ")


@pytest.mark.parametrize("workers", [0, 2])
def test_several_pictures_and_none_come_in_order(tmp_path, workers):
    entries = [talk(n, pictures=(n * 7) % 4) for n in range(9)]
    uri = write_talks(tmp_path, entries)
    streams = {"text": {"kind": "conversation", "text_only": True}}
    towers = {"image": PRE, "image.fine": Preprocess(24, "squash", "bilinear")}
    with loader_of(uri, streams, preprocess=towers, batch_size=9, workers=workers, image={"augment": "random-resized-crop"}) as loader:
        batch = next(loader)
    image, fine, text = batch["image"], batch["image.fine"], batch["text"]
    expected = [(row, slot) for row, key in enumerate(batch.keys) for slot in range(((int(key.rpartition(":")[2]) - 1) * 7) % 4)]
    assert list(zip(image.sample_index.tolist(), image.slot.tolist())) == expected
    assert torch.equal(image.sample_index, fine.sample_index)
    assert torch.equal(image.slot, fine.slot)
    assert fine.values.shape[1:] == (3, 24, 24)
    counts = (text.values == IMAGE_ID).sum(1)
    assert counts.tolist() == [sum(i == row for i, _ in expected) for row in range(9)]
    # Both towers see the same crop: halved pictures of equal content are close.
    coarse = torch.nn.functional.interpolate(fine.values.float(), 16, mode="area")
    assert (coarse - image.values.float()).abs().mean() < 30


def test_workers_ranks_and_resume_change_nothing(tmp_path):
    uri = write_talks(tmp_path, [talk(n, pictures=n % 3) for n in range(20)])
    streams = {
        "text": {"kind": "conversation", "text_only": True},
        "image.noisy": {"kind": "diffusion-noise", "step": 500},
    }
    with loader_of(uri, streams) as one, loader_of(uri, streams, workers=2) as two:
        for _ in range(2):
            equal(next(one), next(two))
        state = json.loads(json.dumps(one.state_dict()))
        rest = [next(one) for _ in range(4)]
    with loader_of(uri, streams) as again:
        again.load_state_dict(state)
        for batch in rest:
            equal(batch, next(again))
    assert rest[0]["image.noisy"].values.dtype == torch.float32


def test_placeholders_and_pictures_must_agree_and_both_counts_are_named(tmp_path):
    few, many = talk(1), talk(2)
    few["image"] = ["1.png", "2.png"]
    many["conversations"][0]["value"] = "<image><image><image> what?"
    uri = write_talks(tmp_path, [talk(0), few, many, talk(3, pictures=0), talk(4)])
    with loader_of(uri, TALK, batch_size=2, bad_samples={"budget": 0.7}, quarantine=tmp_path) as loader:
        next(loader)
        next(loader)
        report = loader.report()
    lines = {e["key"]: e for e in map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())}
    assert report["reasons"]["placeholder_mismatch"] >= 2
    assert lines["2"]["detail"] == "text: 1 placeholders, 2 pictures"
    assert lines["3"]["detail"] == "text: 3 placeholders, 1 pictures"
    assert lines["4"]["reason"] == "missing_image"


def test_pictures_without_a_marker_stand_where_the_template_says(tmp_path):
    entry = talk(0)
    entry["conversations"][0]["value"] = "what?"
    entry["image"] = ["0.png", "1.png"]
    uri = write_talks(tmp_path, [entry])
    with loader_of(uri, TALK, batch_size=1) as loader:
        assert decoded(next(loader)["text"], 0).startswith("<s><image><image>what?\n")


def test_openai_messages_with_parts_and_pictures_of_their_own(tmp_path):
    parts = [{"type": "text", "text": "first "}, {"type": "image"}, {"type": "text", "text": " says <image>"}]
    own = [{"type": "image_url", "image_url": {"url": "3.png"}}, {"type": "text", "text": "q"}]
    answer = {"role": "assistant", "content": "an <image> answer"}
    entries = [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}, answer], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": own}, answer, {"role": "user", "content": "unanswered"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, answer], "images": ["0.png"]},
    ]
    uri = write_talks(tmp_path, entries)
    with loader_of(uri, TALK, batch_size=2, quarantine=tmp_path) as loader:
        batch = next(loader)
        next(loader)
    said = {key[-1]: decoded(batch["text"], row) for row, key in enumerate(batch.keys)}
    assert said["1"] == "<s>be brief\nfirst <image> says <image>\nan <image> answer</s>"
    assert said["2"] == "<s><image>q\nan <image> answer</s>"
    assert (batch["text"].values == IMAGE_ID).sum(1).tolist() == [1, 1]
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"] == "bad_messages"


def test_prompt_and_answer_from_columns_and_literal_text(tmp_path):
    uri = write_shards(tmp_path, 12, 2)
    streams = {"text": {"kind": "conversation", "prompt": {"literal": ["describe it", "what is it?"]}, "answer": "auto"}}
    with loader_of(uri, streams, batch_size=12) as loader:
        batches = [next(loader) for _ in range(2)]
    prompts = Counter()
    for batch in batches:
        for row, key in enumerate(batch.keys):
            whole = decoded(batch["text"], row)
            prompt, answer = whole.removeprefix("<s><image>").removesuffix("</s>").split("\n")
            prompts[prompt] += 1
            assert answer == sample(int(key[-6:]))["txt"].decode()
    assert set(prompts) == {"describe it", "what is it?"}


def test_a_long_answer_is_cut_and_a_long_prompt_is_refused(tmp_path):
    long_answer, long_prompt, late = talk(0), talk(1), talk(2, turns=2)
    long_answer["conversations"][1]["value"] = "thing " * 100
    long_prompt["conversations"][0]["value"] = "<image>" + "thing " * 100
    late["conversations"][1]["value"] = "thing " * 100
    late["conversations"][0]["value"], late["conversations"][2]["value"] = "what?", "<image> and this?"
    uri = write_talks(tmp_path, [long_answer, long_prompt, late])
    for cost in (1, 9):
        table = {"bad_samples": {"budget": 0.7}, "text": {"length": 40}, "quarantine": tmp_path / str(cost)}
        with loader_of(uri, TALK, batch_size=1, picture_positions=cost, **table) as loader:
            batch = next(loader)
            next(loader)
        text = batch["text"]
        assert batch.keys[0].endswith(":1")
        assert text.values.shape == (1, 40 - cost + 1)
        assert text.supervised[0, -1]
        assert text.values[0, -1] != TOKENIZER.eos_id
        assert (text.values == IMAGE_ID).sum() == 1
        reasons = [json.loads(line) for line in (tmp_path / str(cost) / "quarantine.jsonl").read_text().splitlines()]
        assert sorted((r["key"], r["reason"]) for r in reasons) == [("2", "too_long"), ("3", "too_long")]
        assert "of 40 positions" in reasons[0]["detail"]


def test_pictures_of_a_sample_are_bounded_in_number_and_together(tmp_path):
    many = {**talk(0, pictures=65), "image": ["0.png"] * 65}
    uri = write_talks(tmp_path, [many, talk(1, pictures=3), talk(2, pictures=2)])
    with loader_of(uri, TALK, batch_size=1, max_pixels=16 * 16, bad_samples={"budget": 0.7}, quarantine=tmp_path) as loader:
        next(loader)
        next(loader)
    found = {e["key"]: (e["reason"], e["detail"]) for e in map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())}
    assert found["1"] == ("too_many_pictures", "65, expected at most 64")
    assert found["2"][0] == "too_many_pictures"
    assert "768 pixels" in found["2"][1]


def test_povid_the_preset_of_the_design_fits_the_table():
    design = Path(__file__).parents[3] / "docs/design/presets/povid.toml"
    preset = tomllib.loads(design.read_text())
    table = {name: value for name, value in preset["data"].items() if name != "image"}
    table["streams"] |= preset["stages"][1]["data"]["streams"]
    options = DataOptions.model_validate(table)
    assert set(options.conversations) == {"answer.preferred", "answer.rejected"}
    assert options.noises["image.noisy"].betas.from_ == -6.0
    assert options.column_names["answer.preferred"] == "chosen"
    assert DataOptions.model_validate(options.model_dump(mode="json", exclude_unset=True)) == options


def test_text_that_spells_the_placeholder_stays_text(tmp_path):
    entry = talk(0, turns=2)
    entry["conversations"][1]["value"] = "<image></s><s> it said"
    streams = {"text": {"kind": "conversation", "prompt": "q", "answer": "a"}}
    uri = write_talks(tmp_path, [{"image": "0.png", "q": "an <image> is </s>", "a": "<image>"}])
    with loader_of(uri, streams, batch_size=1) as loader:
        text = next(loader)["text"]
    assert decoded(text, 0) == "<s><image>an <image> is </s>\n<image></s>"
    assert (text.values == IMAGE_ID).sum() == 1
    assert (text.values == TOKENIZER.eos_id).sum() == 1
    talks = write_talks(tmp_path / "b", [entry])
    with loader_of(talks, TALK, batch_size=1) as loader:
        assert (next(loader)["text"].values == IMAGE_ID).sum() == 1


def test_questions_are_drawn_kinds_alike_and_anew_in_each_epoch():
    streams = {"text": {"kind": "conversation", "questions": "questions"}}
    with loader_of("scenes:?n=400&size=8", streams, batch_size=400) as loader:
        one, two = next(loader), next(loader)
    first = {k: decoded(one["text"], i) for i, k in enumerate(one.keys)}
    second = {k: decoded(two["text"], i) for i, k in enumerate(two.keys)}
    assert 100 < sum(first[k] != second[k] for k in first) < 400
    kinds = Counter(text.split()[0] + text.split()[1] for text in first.values())
    assert len(kinds) > 4
    only = {"text": {"kind": "conversation", "questions": {"kinds": ["count"]}}}
    with loader_of("scenes:?n=50&size=8", only, batch_size=50) as loader:
        batch = next(loader)
    assert all("how many objects" in decoded(batch["text"], i) for i in range(50))


def test_balanced_answers_are_alike(tmp_path):
    entries = [{"kind": "k", "question": "is it?", "answer": "yes"}] * 8 + [{"kind": "k", "question": "is it?", "answer": "no"}]

    def answers(folder, balance):
        uri = write_talks(folder, [{"image": "0.png", "questions": entries} for _ in range(300)])
        streams = {"text": {"kind": "conversation", "questions": {"balance": balance}}}
        with loader_of(uri, streams, batch_size=300) as loader:
            text = next(loader)["text"]
        return Counter(decoded(text, i, text.supervised) for i in range(300))

    assert answers(tmp_path, "none")["no</s>"] < 80
    assert 110 < answers(tmp_path, "answers")["no</s>"] < 190


POVID = {
    "answer.preferred": {"kind": "conversation", "prompt": {"literal": "describe"}, "answer": "answer.preferred"},
    "answer.rejected": {
        "kind": "conversation",
        "prompt": {"literal": "describe"},
        "answer": {"column": "rejected", "otherwise": {"kind": "corruption", "of": "answer.preferred"}},
    },
    "image.noisy": {"kind": "diffusion-noise", "of": "image", "step": 500},
}


def test_povid_streams_hold_a_right_and_a_wrong_answer_and_a_noisy_picture():
    uri = "scenes:?n=40&size=16"
    with loader_of(uri, POVID, batch_size=40, columns={"answer.preferred": "captions"}, text={"length": 200}) as loader:
        batch = next(loader)
    assert set(batch) == {"image", "image.noisy", "answer.preferred", "answer.rejected"}
    source = open_source(uri)
    captions = {source.key(i): source.read(i).fields["captions"] for i in range(40)}
    right, wrong = batch["answer.preferred"], batch["answer.rejected"]
    for row, key in enumerate(batch.keys):
        good = decoded(right, row, right.supervised).removesuffix("</s>")
        bad = decoded(wrong, row, wrong.supervised).removesuffix("</s>")
        assert good in captions[key]
        assert bad != good
        assert bad in {c.text for k in range(300) for r in (["object"], ["relation"], ["attribute"]) if (c := corrupt(good, r, k, ()))}
    clean, noisy = batch["image"], batch["image.noisy"]
    assert noisy.values.shape == clean.values.shape
    assert torch.equal(noisy.sample_index, clean.sample_index)
    difference = noisy.values - clean.values / 255
    assert 0.2 < difference.std() < 0.5


def test_povid_a_rejected_column_comes_before_the_corruption(tmp_path):
    entries = [{"image": "0.png", "chosen": "a red dog", "rejected": "a cat"}, {"image": "1.png", "chosen": "a red dog"}]
    entries.append({"image": "2.png", "chosen": "nothing"})
    uri = write_talks(tmp_path, entries)
    with loader_of(uri, POVID, batch_size=2, columns={"answer.preferred": "chosen"}, quarantine=tmp_path) as loader:
        batch = next(loader)
        next(loader)
    wrong = batch["answer.rejected"]
    said = {k[-1]: decoded(wrong, i, wrong.supervised) for i, k in enumerate(batch.keys)}
    assert said["1"] == "a cat</s>"
    assert said["2"].endswith("dog</s>")
    assert said["2"] != "a red dog</s>"
    line = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (line["key"], line["reason"]) == ("3", "no_corruption")


def test_infmllm_boxes_are_written_as_the_model_sees_them():
    uri = "scenes:?n=30&size=32"
    source = open_source(uri)
    streams = {"text": {"kind": "conversation", "regions": {"column": "objects", "decimals": 3}}}
    with loader_of(uri, streams, batch_size=30) as loader:
        text, keys = (batch := next(loader))["text"], batch.keys
    things = {source.key(i): source.read(i).fields["objects"] for i in range(30)}
    for row, key in enumerate(keys):
        question, answer = decoded(text, row).removeprefix("<s><image>").removesuffix("</s>").split("\n")
        name = question.removeprefix("where is the ").removesuffix("?")
        box = next(t["box"] for t in things[key] if f"{t['color']} {t['shape']}" == name)
        assert json.loads(answer) == pytest.approx(box, abs=6e-4)
    with pytest.raises(ValidationError, match="no flip"):
        loader_of(uri, streams, image={"flip": True})


def test_noise_beside_captions_leaves_the_rest_as_it_was(tmp_path):
    uri = write_shards(tmp_path, 12, 2)
    with loader_of(uri, {}) as plain, loader_of(uri, {"image.noisy": {"kind": "diffusion-noise"}}) as noisy:
        one, two = next(plain), next(noisy)
    assert set(two) - set(one) == {"image.noisy"}
    assert one["image"].slot is None
    for name in one:
        assert torch.equal(one[name].values, two[name].values)


def test_text_alone_reads_conversations_without_pictures(tmp_path):
    uri = write_talks(tmp_path, [talk(n, pictures=0) for n in range(6)])
    with loader_of(uri, TALK, preprocess=None) as loader:
        assert set(next(loader)) == {"text"}


@pytest.mark.parametrize("balance", ["none", "kinds", "answers"])
def test_several_turns_ask_different_questions_and_end_with_what_there_is(balance):
    questions = [{"kind": "ab"[n % 2], "question": f"q{n}", "answer": f"a{n}"} for n in range(5)]
    for turns, expected in ((1, 1), (3, 3), (9, 5)):
        stream = ConversationStream(questions=Questions(turns=turns, balance=balance))
        said = Conversations({"text": stream}, {}, 1000).make({"questions": questions}, {"text": 7})["text"].messages
        pairs = [(said[i].text, said[i + 1].text) for i in range(0, len(said), 2)]
        assert len(set(pairs)) == len(pairs) == expected
        assert all(q[1:] == a[1:] for q, a in pairs)
        one = ConversationStream(questions=Questions(balance=balance))
        first = Conversations({"text": one}, {}, 1000).make({"questions": questions}, {"text": 7})["text"].messages
        assert (first[0].text, first[1].text) == pairs[0]  # more turns go on from the same draw


def test_the_tokenizer_learns_from_what_is_said(tmp_path):
    uri = write_talks(tmp_path, [talk(n) for n in range(3)])
    options = DataOptions.model_validate({"source": uri, "streams": TALK})
    texts = list(source_texts(open_source(uri), options))
    assert "what is thing 0?" in texts
    assert "a green thing number 1" in texts
    assert not any("<image>" in text for text in texts)


def test_a_tokenizer_without_placeholder_is_refused_at_once(tmp_path):
    uri = write_talks(tmp_path, [talk(0)])
    with pytest.raises(DataError, match="no token <image>"):
        loader_of(uri, TALK, tokenizer=Tokenizer.train_bpe(["a"], 300))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"streams": {"text": {"kind": "conversation", "answer": "a", "questions": "q"}}}, "one source"),
        ({"streams": {"text": {"kind": "conversation", "prompt": "a"}}}, "prompt goes with answer"),
        ({"streams": {"image.x": {"kind": "conversation"}}}, "cannot have this name"),
        ({"streams": {"noisy": {"kind": "diffusion-noise"}}}, "image.NAME"),
        ({"streams": {"image.n": {"kind": "diffusion-noise", "step": 1000}}}, "less than steps"),
        ({"streams": {"text": {"kind": "conversation", "answer": {"otherwise": {"of": "other"}}}}}, "no conversation stream"),
        ({"streams": {"text": {"kind": "conversation", "answer": {}}}}, "needs column"),
        ({"columns": {"imge": "x"}}, "no stream reads it"),
        ({"text": {"template": "nonsense"}}, "unknown template"),
        ({"source": "scenes:", "mixture": {"a": {"source": "scenes:"}}}, "source and mixture"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, said):
    with pytest.raises(ValidationError, match=said):
        DataOptions.model_validate(table)


def test_a_noisy_stream_of_a_tower_that_is_not_there_is_refused():
    options = DataOptions.model_validate({"source": "scenes:?n=4", "streams": {"image.n": {"kind": "diffusion-noise", "of": "image.fine"}}})
    with pytest.raises(DataError, match="the model reads image"):
        build_loader(options, preprocess=PRE, batch_size=2)
    with pytest.raises(DataError, match="expected image"):
        build_loader(options, preprocess={"fine": PRE}, batch_size=2)
