"""Sessions over real sources: the same reading as training, shared embeddings, budgets, skipping."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from vlm.config.errors import DataError, RequestError
from vlm.data.options import DataOptions
from vlm.evaluation import (
    CaptionOptions,
    CostOptions,
    EvaluationOptions,
    LinearProbeOptions,
    PerplexityOptions,
    RetrievalOptions,
    TaskOptions,
    VqaOptions,
    ZeroShotOptions,
    evaluate,
    evaluate_in_memory,
    numbers_of,
)
from vlm.evaluation.encoder import of_memory
from vlm.evaluation.reading import EvaluationData, Reading
from vlm.evaluation.session import Session, kinds_of
from vlm.runtime.pictures import PictureLimits


def shard(path, samples):
    """A tar shard of {key: {extension: bytes}}."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(n=12):
    return {
        f"{i:03d}": {
            "png": png((20 * i, 255 - 20 * i, (7 * i) % 255)),
            "json": json.dumps(
                {"caption": f"colour {i // 2}", "category": f"kind/{i % 3}", "concept": f"c{i // 2}"}
            ).encode(),
        }
        for i in range(n)
    }


def test_shared_captions_and_concepts_of_a_tar(tiny_dual, tmp_path):
    model, tokenizer, _ = tiny_dual
    uri = shard(tmp_path / "a.tar", pairs())
    tasks = [
        RetrievalOptions(examples=3),
        ZeroShotOptions(labels_from="category"),
        LinearProbeOptions(labels_from="category", folds=2),
    ]
    results = evaluate_in_memory(model, tokenizer, tasks, uri)
    assert [r.task for r in results] == ["retrieval", "zero-shot", "linear-probe"]
    assert results[0].details["image_to_text"] | {"median_rank": 0} == {
        "queries": 12, "candidates": 6, "clusters": 6, "median_rank": 0,
    }  # fmt: skip
    assert len(results[0].examples) == 6
    assert all(
        hit["picture"] for e in results[0].examples if e["direction"] == "text_to_image" for hit in e["found"]
    )
    assert results[1].details["classes"] == 3
    assert results[1].details["confusion"]["names"] == ["0", "1", "2"]
    assert len({r.data["sha256"] for r in results}) == 1
    assert {"eval/retrieval/image_to_text/r@1", "eval/zero-shot/top5", "eval/linear-probe/top1"} <= set(
        numbers_of(results)
    )
    again = evaluate_in_memory(model, tokenizer, tasks, uri)
    assert [r.as_json() for r in again] == [r.as_json() for r in results]


def test_pictures_are_embedded_once_for_tasks_that_share_them(tiny_dual, tmp_path):
    model, tokenizer, _ = tiny_dual
    embedder = of_memory(model, tokenizer, model.preprocess())
    calls = []
    original = embedder.encode_image
    embedder.encode_image = lambda pictures: calls.append(len(pictures)) or original(pictures)
    uri = shard(tmp_path / "a.tar", pairs())
    evaluate(embedder, [RetrievalOptions(), ZeroShotOptions(labels_from="category")], uri)
    assert sum(calls) == 12


def test_limit_is_a_seeded_draw_over_the_whole_source(tmp_path):
    data = EvaluationData(shard(tmp_path / "a.tar", pairs()))
    keys = [item.key for item in data.items(5, seed=1)]
    assert keys == [item.key for item in data.items(5, seed=1)]
    assert keys != [item.key for item in data.items(5, seed=2)]
    assert len(set(keys)) == 5
    assert keys == sorted(keys)
    assert len(list(data.items(100))) == 12


def test_bad_samples_are_named_and_the_budget_ends_the_evaluation(tiny_dual, tmp_path):
    model, tokenizer, _ = tiny_dual
    samples = pairs(20)
    samples["007"]["png"] = samples["007"]["png"][:40]
    samples["009"]["png"] = b"<html>"
    del samples["011"]["png"]
    uri = shard(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match="3 of 20 samples are bad"):
        evaluate_in_memory(model, tokenizer, [RetrievalOptions()], uri)
    result = evaluate_in_memory(model, tokenizer, [RetrievalOptions()], uri, bad_budget=0.2)[0]
    assert result.samples == 17
    assert result.bad["count"] == 3
    assert [line.rpartition(":")[0].rpartition("/")[2] != "" for line in result.bad["first"]] == [True] * 3
    assert "007" in result.bad["first"][0]
    assert "not_a_picture" in result.bad["first"][1]


def test_other_text_columns_and_several_texts(tiny_dual, tmp_path):
    samples = pairs(4)
    for i, members in enumerate(samples.values()):
        members["json"] = json.dumps(
            {"caption": f"en {i}", "captions": {"de": [f"eins {i}", f"zwei {i}"]}}
        ).encode()
    uri = shard(tmp_path / "a.tar", samples)
    model, tokenizer, _ = tiny_dual
    result = evaluate_in_memory(
        model, tokenizer, [RetrievalOptions()], uri, reading=Reading(text="captions.de")
    )[0]
    assert result.details["image_to_text"]["candidates"] == 8


def test_drawn_scenes_and_text_files(tiny_dual, tiny_language, tmp_path):
    model, tokenizer, _ = tiny_dual
    result = evaluate_in_memory(
        model, tokenizer, [ZeroShotOptions(labels_from=("absent", "name"))], "scenes:?n=20&split=val"
    )[0]
    assert result.samples == 20
    assert result.details["labels_from"] == "name"
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"a red circle {i}"}) + "\n" for i in range(8)))
    language, tokens, _ = tiny_language
    found = evaluate_in_memory(language, tokens, [PerplexityOptions()], str(path))[0]
    assert found.samples == 8
    assert found.metrics["bits_per_character"] > 0


def test_a_task_that_the_data_cannot_serve_is_skipped_only_when_asked(tiny_dual, tmp_path):
    model, tokenizer, _ = tiny_dual
    uri = shard(tmp_path / "a.tar", pairs())
    tasks = [ZeroShotOptions(labels_from="absent"), RetrievalOptions()]
    with pytest.raises(DataError, match="no sample has a class in 'absent'"):
        evaluate_in_memory(model, tokenizer, tasks, uri)
    said = []
    results = evaluate_in_memory(model, tokenizer, tasks, uri, skip=said.append)
    assert [r.task for r in results] == ["retrieval"]
    assert "'zero-shot' left out" in said[0]


def test_a_task_of_the_other_kind_of_model_is_refused(tiny_dual, tiny_language):
    with pytest.raises(RequestError, match="needs a language model"):
        Session(of_memory(*tiny_dual[:2], tiny_dual[0].preprocess()), "scenes:?n=2").run(PerplexityOptions())
    with pytest.raises(RequestError, match="needs a model of pictures"):
        Session(of_memory(*tiny_language[:2], None), "scenes:?n=2").run(RetrievalOptions())
    dual, language = of_memory(*tiny_dual[:2], tiny_dual[0].preprocess()), of_memory(*tiny_language[:2], None)
    assert (kinds_of(dual), kinds_of(language)) == (["pictures"], ["tokens"])
    for model, can in ((dual, "try retrieval"), (language, "try perplexity")):
        for task in (VqaOptions(), CaptionOptions(), CostOptions()):
            with pytest.raises(RequestError, match=f"{task.task} needs a model that reads pictures and writes") as caught:
                Session(model, "scenes:?n=2").run(task)
            assert can in str(caught.value)
    with pytest.raises(RequestError, match="no data"):
        Session(of_memory(*tiny_dual[:2], tiny_dual[0].preprocess()), None).run(RetrievalOptions())


def test_tasks_are_told_apart_by_name_and_refuse_unknown_keys():
    options = EvaluationOptions.model_validate(
        {"every": "25%", "tasks": [{"task": "zero-shot", "labels_from": "name"}]}
    )
    assert isinstance(options.tasks[0], ZeroShotOptions)
    written = {"task": "vqa", "controls": ["none"], "questions_from": "asked", "balance": "yes-no"}
    assert TypeAdapter(TaskOptions).validate_python(written) == VqaOptions(
        controls=("none",), questions_from="asked", balance="yes-no"
    )
    with pytest.raises(ValueError, match="extra_forbidden|Extra inputs"):
        TypeAdapter(TaskOptions).validate_python({"task": "retrieval", "cutofs": [1]})
    with pytest.raises(ValueError, match="does not match any of the expected tags"):
        TypeAdapter(TaskOptions).validate_python({"task": "retrival"})


def test_the_fingerprint_follows_the_pixels(tmp_path, tiny_dual):
    model, tokenizer, _ = tiny_dual
    samples = pairs(6)
    uris = [shard(tmp_path / "a.tar", samples)]
    samples["000"]["png"] = png((1, 2, 3))
    (tmp_path / "b").mkdir()
    uris.append(shard(tmp_path / "b" / "a.tar", samples))
    prints = [
        evaluate_in_memory(model, tokenizer, [RetrievalOptions()], uri)[0].data["sha256"] for uri in uris
    ]
    assert prints[0] != prints[1]


def test_importing_the_catalogue_costs_no_model_code():
    import subprocess
    import sys

    code = "import sys, vlm.evaluation; print('transformers' in sys.modules, 'vlm.models' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_better_model_scores_better(tmp_path, material):
    """The whole chain tells a model that knows from one that does not."""
    vectors = {f"t{i}": np.eye(30)[i] for i in range(30)}
    from vlm.evaluation.retrieval import retrieval

    knows = retrieval(material(np.eye(30), list(vectors), table=vectors), RetrievalOptions())
    guesses = retrieval(
        material(np.random.default_rng(0).normal(size=(30, 30)), list(vectors), table=vectors),
        RetrievalOptions(),
    )
    assert knows.intervals["image_to_text"]["r@1"]["lower"] > 80
    assert guesses.intervals["image_to_text"]["r@1"]["upper"] < 50


def test_a_title_is_a_caption_here_as_in_training(tiny_language, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"title": f"a red circle {i}"}) + "\n" for i in range(8)))
    model, tokens, _ = tiny_language
    assert evaluate_in_memory(model, tokens, [PerplexityOptions()], str(path))[0].samples == 8


def test_where_keeps_samples_of_data_val_and_of_no_other_data(tiny_dual, tmp_path):
    samples = pairs(6)
    for i, members in enumerate(samples.values()):
        members["json"] = json.dumps({"caption": f"text {i}", "source": "ab"[i % 2]}).encode()
    uri, other = shard(tmp_path / "a.tar", samples), shard(tmp_path / "b.tar", samples)
    reading = Reading.of_table({"where": {"source": "a*"}})
    assert reading == Reading.of(DataOptions(where={"source": "a*"}))
    assert len(EvaluationData(uri, reading)) == 3
    assert len(EvaluationData(uri, reading.of_all)) == 6
    model, tokenizer, _ = tiny_dual
    assert evaluate_in_memory(model, tokenizer, [RetrievalOptions()], uri, reading=reading)[0].samples == 3
    elsewhere = RetrievalOptions(data=other)
    assert evaluate_in_memory(model, tokenizer, [elsewhere], uri, reading=reading)[0].samples == 6


def test_the_caps_of_a_run_hold_in_its_evaluation(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"txt": "long" * i}) + "\n" for i in (1, 5)))
    table = {"columns": {"text": "txt", "answer.preferred": "x"}, "max_text": 10, "max_pixels": 100, "source": "scenes:"}
    reading = Reading.of_table(table)
    assert reading == Reading(text="txt", limits=PictureLimits(max_pixels=100), max_text=10)
    first, second = EvaluationData(str(path), reading).items()
    assert first.problem is None
    assert first.texts == ("long",)
    assert second.problem is not None
    assert "more than 10 characters" in second.problem


def test_a_task_that_says_how_many_examples_it_keeps_keeps_so_many(tiny_dual, tmp_path):
    model, tokenizer, _ = tiny_dual
    uri = shard(tmp_path / "a.tar", pairs())
    tasks = [RetrievalOptions(), RetrievalOptions(name="other", examples=1)]
    general, own = evaluate_in_memory(model, tokenizer, tasks, uri, examples=3)
    assert (len(general.examples), len(own.examples)) == (6, 2)
