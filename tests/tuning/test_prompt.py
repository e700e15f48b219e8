"""Learned prompts: equal to words where they begin as words, alone in learning, and of no effect on any other text. Source: coop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, CLIPTokenizer

from vlm.config.errors import RequestError
from vlm.data.options import DataOptions
from vlm.data.streams.classes import class_stream
from vlm.data.streams.options import ClassTexts
from vlm.data.tokenizer import Tokenizer
from vlm.models import DualEncoderOptions, LanguageOptions
from vlm.models.context import Context, ContextOptions
from vlm.objectives import BuildContext
from vlm.objectives.classification import ClassificationOptions, CosineHead
from vlm.runtime.prompt import LearnedPrompt
from vlm.training.assembly import choose_trainable
from vlm.tuning import PromptOptions, TuningOptions, with_prompt
from vlm.tuning.prompt import CONTEXT
from vlm.types import Batch, Labels, Pictures, Role, SingleProcess, TokenIds, Views, VocabularyLayout
from vlm.types import Context as Moment

CLASSES = ["red circle", "blue_square", "star", "a long green ring"]
HAND = "a photo of a {}."
POOLS = {
    "eos": {"attention": "causal", "pool": "eos"},
    "last": {"attention": "bidirectional", "pool": "last", "mask_padding": False},
    "mean": {"attention": "bidirectional", "pool": "mean"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe([HAND.replace("{}", name.replace("_", " ")) for name in CLASSES] * 4, 320)


def dual(tokenizer, seed=0, **text):
    torch.manual_seed(seed)
    tower = {"width": 24, "depth": 2, "heads": 2}
    options = DualEncoderOptions.model_validate(
        {
            "embed_dim": 16,
            "vision": {**tower, "depth": 1, "image_size": 16, "patch_size": 8},
            "text": {**tower, "length": 24, **text},
        }
    )
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return options.build(VocabularyLayout.of_text(tokenizer.vocab_size, special)).eval()


def prompted(model, tokenizer, seed=0, classes=CLASSES, **options):
    return with_prompt(model, tokenizer, PromptOptions.model_validate(options), classes, seed=seed)


def texts_of(model, tokenizer, template=None, classes=CLASSES):
    return class_stream("classes", ClassTexts(template=template), classes, tokenizer, model.options.text.length, model.prompt)


def embedded(model, stream):
    """[n, E] of the rows of a stream."""
    zeros = torch.zeros(0, dtype=torch.int64)
    batch = Batch({}, [], zeros, zeros, shared={"classes": stream})
    return model.encode(batch, {"classes": frozenset({"embedding"})})["classes"].embedding


def pictures(count=6):
    values = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Pictures(values, torch.ones(count, dtype=torch.bool), torch.arange(count))


def batch_of(model, tokenizer, count=6, **stream):
    numbers = torch.arange(count)
    labels = Labels(numbers % len(CLASSES), torch.ones(count, dtype=torch.bool), numbers)
    shared = {"classes": texts_of(model, tokenizer, **stream)}
    return Batch({"image": pictures(count), "label": labels}, list("abcdef"[:count]), numbers, torch.zeros_like(numbers), shared=shared)


def loss_of(model, batch):
    """The mean cross-entropy of the cosine head, and its logits."""
    options = ClassificationOptions(head=CosineHead())
    objective = options.build(BuildContext(model, {}, CLASSES))
    outputs = model.encode(batch, {"image": frozenset({"embedding"}), "classes": frozenset({"embedding"})})
    views = Views({f"model/{name}": value for name, value in outputs.items()})
    terms = objective(views, Moment(batch, SingleProcess(), 0, 0.0, 0))
    x, t = (F.normalize(outputs[name].embedding, dim=-1) for name in ("image", "classes"))
    return terms.total() / terms.weights.sum(), model.scale().exp() * x @ t.T


@pytest.mark.parametrize("pool", POOLS)
def test_coop_from_the_words_of_the_hand_prompt_gives_its_logits_exactly(tokenizer, pool):
    model = dual(tokenizer, **POOLS[pool])
    made, longer = prompted(model, tokenizer, init={"kind": "text", "text": "a photo of a"})
    assert made.prompt.length == len(tokenizer.ids(["a photo of a"], add_special=False)[0])
    with torch.no_grad():
        learned, hand = embedded(made, texts_of(made, longer)), embedded(model, texts_of(model, tokenizer, HAND))
        assert torch.equal(learned, hand)
        one, two = loss_of(made, batch_of(made, longer)), loss_of(model, batch_of(model, tokenizer, template=HAND))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_coop_rows_of_words_stand_where_the_words_would(tokenizer):
    made, longer = prompted(dual(tokenizer), tokenizer, init={"kind": "text", "text": "a photo of a"})
    stream, hand = texts_of(made, longer), texts_of(made, longer, HAND)
    assert torch.equal(stream.mask, hand.mask)
    learned = stream.role == Role.LEARNED
    assert (learned.sum(1) == made.prompt.length).all()
    assert torch.equal(learned, stream.values != hand.values)  # so the end of the text, where the tower pools, is in its place
    assert not (hand.role == Role.LEARNED).any()
    assert stream.sample_index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_coop_equal_rows_of_each_class_equal_shared_ones(tokenizer, pool, position):
    model = dual(tokenizer, **POOLS[pool])
    shared, one = prompted(model, tokenizer, length=5, position=position)
    each, many = prompted(model, tokenizer, length=5, position=position, per_class=True)
    assert each.get_parameter(CONTEXT).shape == (len(CLASSES), 5, 24)
    with torch.no_grad():
        each.get_parameter(CONTEXT).copy_(shared.get_parameter(CONTEXT).expand(len(CLASSES), -1, -1))
        assert torch.equal(embedded(each, texts_of(each, many)), embedded(shared, texts_of(shared, one)))
        each.get_parameter(CONTEXT)[2] += 1.0
        moved = embedded(each, texts_of(each, many)) != embedded(shared, texts_of(shared, one))
    assert moved.any(1).tolist() == [False, False, True, False]


def test_coop_without_vectors_is_the_name_and_its_period(tokenizer):
    model = dual(tokenizer)
    shape = ContextOptions(length=0, first_id=tokenizer.vocab_size)
    options = model.options.model_copy(update={"text": model.options.text.model_copy(update={"prompt": shape})})
    none = options.build(model.vocabulary)
    none.load_state_dict({**model.state_dict(), CONTEXT: torch.zeros(0, 24)})
    assert none.prompt.template() == "{}."
    longer = tokenizer.with_special(none.prompt.tokens, strip=True)
    with torch.no_grad():
        assert torch.equal(embedded(none, texts_of(none, longer)), embedded(model, texts_of(model, tokenizer, "{}.")))


@pytest.mark.parametrize("per_class", [False, True])
def test_coop_only_the_vectors_learn_and_their_gradient_is_that_of_the_loss(tokenizer, per_class):
    made, longer = prompted(dual(tokenizer), tokenizer, length=3, per_class=per_class)
    made.double()
    choose_trainable(made, TuningOptions(prompt=PromptOptions(length=3)))
    assert [name for name, p in made.named_parameters() if p.requires_grad] == [CONTEXT]
    batch = batch_of(made, longer)
    made.pixel_norm.double()
    loss_of(made, batch)[0].backward()
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {CONTEXT}
    vectors = made.get_parameter(CONTEXT)
    direction = torch.randn(vectors.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = (vectors.grad * direction).sum()
    values = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            vectors += step * direction
            x = {n: F.normalize(made.encode(batch, {n: frozenset({"embedding"})})[n].embedding, dim=-1) for n in ("image", "classes")}
            logits = made.scale().exp() * x["image"] @ x["classes"].T
            values.append(F.cross_entropy(logits, batch["label"].values))
            vectors -= step * direction
    assert wanted.abs() > 1e-4
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, wanted, rtol=1e-3, atol=1e-6)


def test_coop_other_texts_are_read_as_before(tokenizer):
    model = dual(tokenizer)
    made, longer = prompted(model, tokenizer, length=7)
    others = ["a photo of a star.", "", "context of a red circle", "< context >"]
    for one, two in ((tokenizer, longer), (longer, longer)):
        rows = [torch.from_numpy(array) for array in one.encode(others, 24)]
        same = [torch.from_numpy(array) for array in two.encode(others, 24)]
        assert torch.equal(rows[0], same[0])
        with torch.no_grad():
            assert torch.equal(model.text.embed(*rows), made.text.embed(*same))


def test_coop_the_greatest_id_of_published_towers_is_still_the_end(tokenizer):
    """eos_id 2 means the greatest id: the prompt's own ids are greater, and are not it."""
    model = dual(tokenizer, eos_id=2)
    made, longer = prompted(model, tokenizer, init={"kind": "text", "text": "a photo of a"})
    with torch.no_grad():
        assert torch.equal(embedded(made, texts_of(made, longer)), embedded(model, texts_of(model, tokenizer, HAND)))


def test_words_beyond_the_vectors_repeat_the_last_one_and_ids_are_never_looked_up():
    context = Context(ContextOptions(length=2, first_id=9), 3, eos_id=0)
    ids = torch.tensor([[9, 4, 9, 9], [5, 6, 7, 8]])
    x = torch.arange(24.0).reshape(2, 4, 3)
    out = context(x, ids)
    assert torch.equal(out[0], torch.stack([context.vectors[0], x[0, 1], context.vectors[1], context.vectors[1]]))
    assert torch.equal(out[1], x[1])
    assert context.without(ids).tolist() == [[1, 4, 1, 1], [5, 6, 7, 8]]  # 0 is where this tower pools


def test_first_vectors_are_keyed_draws(tokenizer):
    model = dual(tokenizer)
    one, same, other = (prompted(model, tokenizer, seed=s, length=4)[0].get_parameter(CONTEXT).detach() for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0.005 < float(one.std()) < 0.05


def test_templates_say_where_the_name_stands():
    c = "<context>"
    assert LearnedPrompt(3, "end").text("fox") == f"{c} {c} {c} fox."
    assert LearnedPrompt(3, "middle").text("fox") == f"{c} fox {c} {c}."
    assert LearnedPrompt(3, "front", "!").text("fox") == f"fox {c} {c} {c}!"
    each = LearnedPrompt(1, "end", "", ("a/red_fox", "crow"))
    assert each.text("red fox", "a/red_fox") == "<context.0> red fox"
    assert each.text("crow") == "<context.1> crow"
    assert each.row("red fox") == 0
    with pytest.raises(RequestError, match="'wolf' is none of them"):
        each.text("wolf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 30}, "takes 34 of 24 positions"),
        ({"length": 3, "init": {"kind": "text", "text": "a photo of a"}}, "has 4 tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(tokenizer, options, message):
    with pytest.raises(RequestError, match=message):
        prompted(dual(tokenizer), tokenizer, **options)


def test_a_name_that_does_not_fit_is_refused_and_not_cut(tokenizer):
    made, longer = prompted(dual(tokenizer), tokenizer, length=18)
    texts_of(made, longer, classes=["star", "ring"])
    with pytest.raises(RequestError, match="of 24 tokens"):
        texts_of(made, longer, classes=["star", "a long green ring with a very small red circle on it"])


def test_one_prompt_a_model_and_dual_encoders_alone(tokenizer):
    made, longer = prompted(dual(tokenizer), tokenizer, length=2)
    with pytest.raises(RequestError, match="has learned a prompt already"):
        prompted(made, longer, length=2)
    shape = {"width": 16, "depth": 1, "heads": 2, "ffn_width": 24, "length": 9}
    language = LanguageOptions.model_validate(shape).build(VocabularyLayout.of_text(tokenizer.vocab_size))
    with pytest.raises(RequestError, match="this is a language model"):
        prompted(language, tokenizer, length=2)
    with pytest.raises(ValueError, match="has none there"):
        PromptOptions.model_validate({"position": "front", "init": {"kind": "text", "text": "a"}})


def test_class_texts_want_a_label_and_a_name_of_their_own():
    stream = {"classes": {"kind": "classes"}}
    assert DataOptions.model_validate({"label": "name", "streams": stream}).class_texts
    with pytest.raises(ValueError, match="texts of classes want label"):
        DataOptions.model_validate({"streams": stream})
    with pytest.raises(ValueError, match="texts of classes cannot have this name"):
        DataOptions.model_validate({"label": "name", "streams": {"text": {"kind": "classes"}}})


def test_a_batch_is_cut_with_its_class_texts_whole(tokenizer):
    made, longer = prompted(dual(tokenizer), tokenizer, length=2)
    made.double()
    whole = batch_of(made, longer)
    parts = whole.split(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert all(part["classes"] is whole["classes"] for part in parts)
    made.zero_grad()
    loss_of(made, whole)[0].backward()
    wanted = made.get_parameter(CONTEXT).grad.clone()
    other = copy.deepcopy(made)
    other.zero_grad()
    for part in parts:  # micro-batches give the gradient of the whole
        (loss_of(other, part)[0] / 3).backward()
    torch.testing.assert_close(other.get_parameter(CONTEXT).grad, wanted, rtol=1e-3, atol=1e-5)


def test_token_ids_of_class_texts_are_a_stream(tokenizer):
    made, longer = prompted(dual(tokenizer), tokenizer, length=2)
    assert isinstance(texts_of(made, longer), TokenIds)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tokenizer of CLIP's own kind: lower case, words that end in </w>, eos as padding and the greatest id; its merges make two words."""
    characters = list(ByteLevel.alphabet())
    pieces = ["ph", "pho", "phot", "photo</w>", "of</w>"]
    words = [*characters, *(f"{c}</w>" for c in characters), *pieces, "<|startoftext|>", "<|endoftext|>"]
    merges = [("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o</w>"), ("o", "f</w>")]
    folder = tmp_path_factory.mktemp("published")
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges).save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("per_class", [False, True])
def test_coop_equals_the_hand_prompt_with_a_published_tokenizer(published, per_class, tmp_path):
    model = dual(published, length=48, eos_id=published.eos_id)
    made, longer = prompted(model, published, init={"kind": "text", "text": "a photo of a"}, per_class=per_class)
    assert made.prompt.length == 4
    assert longer.vocab_size == published.vocab_size + len(made.prompt.tokens)
    with torch.no_grad():
        assert torch.equal(embedded(made, texts_of(made, longer)), embedded(model, texts_of(model, published, HAND)))
    longer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    said = [made.prompt.text("Star", CLASSES[2]), "A photo of a Star."]
    assert again.ids(said) == longer.ids(said)
    assert again.agrees(published)


def test_coop_other_libraries_read_the_same_ids(tokenizer, tmp_path):
    made, longer = prompted(dual(tokenizer), tokenizer, length=3, position="middle")
    longer.save(tmp_path)
    texts = [made.prompt.text("red circle"), "a photo of a star."]
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == longer.ids(texts)


def test_the_loss_is_cross_entropy_over_samples_that_have_a_class(tokenizer):
    made, longer = prompted(dual(tokenizer), tokenizer, length=2)
    batch = batch_of(made, longer)
    labels = batch["label"]
    known = torch.tensor([True, True, False, True, True, False])
    some = batch.with_streams({"label": Labels(torch.where(known, labels.values, -1), known, labels.sample_index)})
    with torch.no_grad():
        whole, logits = loss_of(made, batch)
        torch.testing.assert_close(whole, F.cross_entropy(logits, labels.values))
        part, _ = loss_of(made, some)
        torch.testing.assert_close(part, F.cross_entropy(logits[known], labels.values[known]))
