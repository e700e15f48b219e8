"""A torch model from memory and from disk: the same embeddings, evaluation mode inside, mode restored."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.config.errors import CheckpointError, RequestError
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.encoder import TorchEmbedder, TorchLanguage, describe_model, of_memory, open_model
from vlm.models import save_model


def test_a_saved_model_gives_the_same_embeddings_as_the_one_in_memory(tiny_dual):
    model, tokenizer, directory = tiny_dual
    pictures = [Image.new("RGB", (20 + i, 30), (40 * i, 90, 10)) for i in range(5)]
    texts = ["a red circle", "", "a " * 200]
    memory = of_memory(model, tokenizer, model.preprocess(), batch=2)
    disk = open_model(directory)
    assert isinstance(disk, TorchEmbedder)
    np.testing.assert_allclose(memory.encode_image(pictures), disk.encode_image(pictures), atol=1e-6)
    np.testing.assert_allclose(memory.encode_text(texts), disk.encode_text(texts), atol=1e-6)
    rows = disk.encode_image(pictures)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(disk.encode_pixels([disk.prepare_image(p) for p in pictures]), rows)


def test_embedding_is_the_models_own_without_gradients_or_autocast(tiny_dual):
    model, tokenizer, _ = tiny_dual
    embedder = of_memory(model, tokenizer, model.preprocess())
    model.train()
    picture = Image.new("RGB", (16, 16), (200, 30, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = embedder.encode_image([picture])
    assert model.training
    model.eval()
    pixels = torch.from_numpy(model.preprocess().to_array(picture))[None]
    with torch.no_grad():
        _, pooled, _ = model.vision(model.pixel_norm(pixels), set())
        expected = torch.nn.functional.normalize(model.vision.project(pooled), dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_similarity_is_the_models(tiny_dual):
    model, tokenizer, _ = tiny_dual
    embedder = of_memory(model, tokenizer, model.preprocess())
    assert (embedder.form, embedder.bias) == ("softmax", 0.0)
    assert embedder.scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_a_language_model_is_known_by_what_it_offers(tiny_language):
    model, tokenizer, directory = tiny_language
    scorer = open_model(directory)
    assert isinstance(scorer, TorchLanguage)
    assert scorer.starts
    assert scorer.vocab_size == model.vocabulary.size
    assert scorer.length == 32
    ids = scorer.tokenize(["ab"])[0]
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_missing_or_foreign_directory_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such model directory"):
        open_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_model(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_dual, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_dual[2], folder)
    words = " ".join(f"word{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
    Tokenizer.train_bpe([words], 400).save(folder)
    with pytest.raises(CheckpointError, match="the tokenizer has"):
        open_model(folder)


def test_a_picture_model_needs_preprocessing(tiny_dual):
    with pytest.raises(RequestError, match="preprocessing"):
        of_memory(tiny_dual[0], tiny_dual[1], None)


def test_description_changes_with_the_weights(tiny_dual, tmp_path):
    before = describe_model(tiny_dual[2])
    assert before == describe_model(tiny_dual[2])
    folder = tmp_path / "model"
    shutil.copytree(tiny_dual[2], folder)
    assert describe_model(folder)["sha256"] == before["sha256"]
    model = tiny_dual[0]
    save_model(model, folder, {k: v + 1 if k == "log_scale" else v for k, v in model.state_dict().items()})
    assert describe_model(folder)["sha256"] != before["sha256"]
