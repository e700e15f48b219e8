"""Cost: what is counted equals the formulas, what is measured is positive and says so."""

import pytest

from tests.evaluation.colour_generator import ColourGenerator, colour_shard
from vlm.config.errors import RequestError
from vlm.evaluation import CostOptions, evaluate
from vlm.evaluation.flops import (
    GeneratorShape,
    TowerShape,
    TrunkShape,
    cache_bytes,
    generator_flops,
    prefill_flops,
    step_flops,
)
from vlm.evaluation.table import table_of


class Shaped(ColourGenerator):
    """It drops half of the four positions of a picture after its first layer."""

    def shape(self):
        tower = TowerShape(TrunkShape(8, 2, 2, 2, 4, 16), 4, 48, connector=96)
        decoder = TrunkShape(12, 3, 3, 1, 4, 20, gated=True)
        return GeneratorShape({"vision": 1000, "connector": 96, "language": 5000}, {"image": tower}, {"image": 4}, decoder, self.vocab_size)

    def kept(self, prompt):
        full = self.positions(prompt)
        return [full, full - 2, full - 2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return colour_shard(tmp_path_factory.mktemp("cost") / "a.tar")


def ask(uri, generator, **options):
    return evaluate(generator, [CostOptions(prompt="describe the picture", **options)], uri)[0]


def test_pyramiddrop_cost_is_counted_from_shapes(uri):
    generator = Shaped()
    result = ask(uri, generator)
    counted, shape = result.metrics["counted"], generator.shape()
    assert result.samples == 8
    assert counted["prompt_positions"] == 3 + 4
    assert counted["picture_positions"] == counted["visual_tokens"] == 4
    assert counted["parameters"] == 6096
    kept = [7, 5, 5]
    assert result.details["positions_by_layer"] == kept
    operations = generator_flops(shape, {"image": 1}, kept)
    assert counted["prefill_flops"] == operations["total"]
    assert counted["vision_flops"] + counted["decoder_flops"] == operations["total"]
    assert counted["step_flops"] == step_flops(shape.decoder, kept, generator.vocab_size)
    assert counted["cache_bytes"] == cache_bytes(shape.decoder, kept) == 2 * 4 * 17 * 4
    full = prefill_flops(shape.decoder, [7] * 3)
    assert counted["share_of_full_prefill"] == pytest.approx(prefill_flops(shape.decoder, kept) / full, abs=1e-6)


def test_time_is_measured_and_said_to_be(uri):
    result = ask(uri, ColourGenerator(), repeats=1, limit=3, max_new_tokens=4)
    measured = result.metrics["measured"]
    assert measured["time_to_first_token"] > 0
    assert measured["tokens_per_second"] > 0
    interval = result.intervals["measured"]["mean_tokens_per_second"]
    assert interval["lower"] <= measured["mean_tokens_per_second"] <= interval["upper"]
    assert "runs of each prompt" in result.details["measured"]
    assert "not known" in result.details["shapes"]
    assert set(result.metrics["counted"]) == {"prompt_positions", "picture_positions"}
    assert "tokens_per_second" not in ask(uri, ColourGenerator(), max_new_tokens=1, limit=2).metrics["measured"]
    assert "counted  prompt positions" in table_of(result)


def test_a_prompt_without_room_for_the_answer_is_refused(uri):
    with pytest.raises(RequestError, match="the model has 48"):
        ask(uri, ColourGenerator(), max_new_tokens=42)
    with pytest.raises(ValueError, match="controls"):
        CostOptions(controls=("none",))
