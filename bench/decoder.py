"""Cases of the whole decoder path: token dropping, greedy decoding, one training step.

Dropping (pyramiddrop): 576 visual and 64 text positions, width 512, 12 layers, 8 heads. After layers 1, 4 and 8 a third,
a sixth and a twelfth of the visual positions stay, so the layers read 144 of 576 on average, 25 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.bench.case import Arm, Case, Work, with_backend
from vlm.evaluation.flops import TrunkShape, cache_bytes, prefill_flops
from vlm.models import LanguageModel, LanguageOptions, VisionLanguageModel, VisionLanguageOptions
from vlm.models.decoder import Cache, run_decoder
from vlm.types import Batch, Layout, Pictures, TokenIds, VocabularyLayout
from vlm.types.batch import Role
from vlm.types.layout import Modality

TEXT, STEPS, NEW_TOKENS = 64, 32, 64
SHARE_OF_BOUND = 0.8
"""End to end we set out to reach this share of what Amdahl's law allows."""
FULL = "the same model, nothing dropped"
TRANSFORMERS = "transformers LlamaForCausalLM.generate"
SPECIAL = {"pad": 0, "eos": 1, "bos": 2, "image": 3}


@dataclass(frozen=True)
class Shape:
    """A decoder behind a square grid of visual tokens. layers, ratios: of the dropping."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    ffn_width: int = 1376
    vocab_size: int = 8192
    image_size: int = 336
    tower_width: int = 256
    tower_depth: int = 8
    layers: tuple[int, ...] = (1, 4, 8)
    ratios: tuple[float, ...] = (1 / 3, 1 / 6, 1 / 12)

    @property
    def visual(self) -> int:
        """Visual positions: patches of 14 pixels."""
        return (self.image_size // 14) ** 2

    def vocabulary(self) -> VocabularyLayout:
        return VocabularyLayout.of_text(self.vocab_size, SPECIAL)

    def language(self) -> LanguageOptions:
        return LanguageOptions(
            width=self.width, depth=self.depth, heads=self.heads, ffn_width=self.ffn_width, length=1024, vocab_size=self.vocab_size
        )

    def model(self, dropping: bool) -> VisionLanguageModel:
        """The model, equal weights with and without dropping."""
        torch.manual_seed(0)
        tower = dict(width=self.tower_width, depth=self.tower_depth, heads=4, image_size=self.image_size, patch_size=14)
        table: dict[str, Any] = dict(towers={"main": tower}, connector={"kind": "mlp"}, language=self.language(), length=1024)
        if dropping:
            table["tokens"] = {"keep": {"kind": "stages", "layers": list(self.layers), "ratios": list(self.ratios)}}
        return VisionLanguageOptions.model_validate(table).build(self.vocabulary()).eval()

    def kept(self, dropping: bool) -> list[int]:
        """[L] visual positions that each layer reads."""
        stages = {layer: int(self.visual * ratio + 1e-9) for layer, ratio in zip(self.layers, self.ratios)} if dropping else {}
        out = [self.visual]
        for layer in range(1, self.depth):
            out.append(stages.get(layer, out[-1]))
        return out

    def allowed(self) -> tuple[float, float]:
        """How much faster the prefill and a step could be at best: by their operations, and by the bytes that a step
        reads (weights, cached keys and values), full over dropped."""
        trunk = TrunkShape.of(self.language().trunk())
        full, dropped = (prefill_flops(trunk, [TEXT + n for n in self.kept(d)]) for d in (False, True))
        with torch.device("meta"):  # shapes alone
            weights = 4 * sum(p.numel() for p in self.language().build(self.vocabulary()).parameters())
        return full / dropped, (weights + self.bytes(False)) / (weights + self.bytes(True))

    def bytes(self, dropping: bool) -> int:
        """Of the cache after the prefill, float32."""
        return cache_bytes(TrunkShape.of(self.language().trunk()), [TEXT + n for n in self.kept(dropping)])


def tensors_of(logits: Tensor, cache: Cache) -> list[Tensor]:
    return [logits, *cache.tensors()]


def prefill(shape: Shape) -> Callable[[], dict[Arm, Work]]:
    """A decoder over one row of visual and text positions that are there already; the cache is kept."""

    def build() -> dict[Arm, Work]:
        model = shape.model(dropping=True)
        language, tokens = model.language, model.options.tokens
        assert tokens is not None
        generator = torch.Generator().manual_seed(0)
        length = shape.visual + TEXT
        visual = (torch.arange(length)[None] >= 8) & (torch.arange(length)[None] < 8 + shape.visual)
        x = torch.randn(1, length, shape.width, generator=generator) * 0.02
        layout = Layout.of_tokens(
            torch.zeros(1, length, dtype=torch.int64),
            torch.ones(1, length, dtype=torch.bool),
            torch.zeros(1, dtype=torch.int64),
            role=torch.full((1, length), int(Role.INSTRUCTION)),
            modality=torch.where(visual, int(Modality.IMAGE), int(Modality.TEXT)),
        )
        layout = replace(layout, picture=torch.where(visual, 0, -1))

        def work(dropping: bool) -> Work:
            @torch.no_grad()
            def run() -> object:
                reducer = tokens.reducer(layout, len(language.trunk.blocks)) if dropping else None
                result = run_decoder(language.trunk, x, layout, keep_cache=True, reducer=reducer)
                assert result.cache is not None
                return tensors_of(language.last_logits(result), result.cache)

            return run

        return {"dispatched": work(True), "peer": work(False)}

    return build


def answer(shape: Shape) -> Callable[[], dict[Arm, Work]]:
    """From pixels to the last of the new tokens, one row; and the vision tower and the full prefill by themselves."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, shape.vocab_size, (1, TEXT + 1), generator=generator)
        ids[0, 8] = SPECIAL["image"]
        text = TokenIds(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(1))
        values = torch.rand(1, 3, shape.image_size, shape.image_size, generator=generator)
        pictures = {"image": Pictures(values, torch.ones(1, dtype=torch.bool), torch.arange(1))}
        dropped, full = shape.model(dropping=True), shape.model(dropping=False)

        def work(model: VisionLanguageModel, steps: int) -> Work:
            @torch.no_grad()
            def run() -> object:
                logits, cache = model.prefill(text, pictures)
                for _ in range(steps):
                    logits, cache = model.advance(logits.argmax(-1), cache)
                return tensors_of(logits, cache)

            return run

        @torch.no_grad()
        def tower() -> object:
            return full.visual_tokens({"main": full.pixel_norms["main"](values)})[0]

        return {
            "dispatched": work(dropped, STEPS),
            "peer": work(full, STEPS),
            "tower": tower,
            "peer to first token": work(full, 0),
            "to first token": work(dropped, 0),
        }

    return build


def account_of_prefill(shape: Shape) -> Callable[[Mapping[Arm, float]], dict[str, object]]:
    def account(times: Mapping[Arm, float]) -> dict[str, object]:
        return {
            "visual_positions": {f"layer {layer}": n for layer, n in enumerate(shape.kept(True), 1)},
            "ratio_allowed_by_operations": round(shape.allowed()[0], 3),
            "cache_bytes": shape.bytes(True),
            "peer_cache_bytes": shape.bytes(False),
        }

    return account


def account_of_answer(shape: Shape) -> Callable[[Mapping[Arm, float]], dict[str, object]]:
    """Amdahl's law: of the peer's measured time the shares p of the prefill and q of the steps get shorter, at best by the
    s and t of `Shape.allowed`; 1 / (1 - p - q + p / s + q / t) is allowed."""

    def account(times: Mapping[Arm, float]) -> dict[str, object]:
        whole, tower, first = times["peer"], times["tower"], times["peer to first token"]
        reading, writing = max(0.0, first - tower) / whole, max(0.0, whole - first) / whole
        for_reading, for_writing = shape.allowed()
        bound = 1 / (1 - reading - writing + reading / for_reading + writing / for_writing)
        return {
            "target": round(SHARE_OF_BOUND * bound, 3),
            "allowed_by_amdahl": round(bound, 3),
            "reached_of_allowed": round(whole / times["dispatched"] / bound, 3),
            "shares_of_peer": {
                "tower": round(tower / whole, 3),
                "prefill": round(reading, 3),
                "steps": round(writing, 3),
            },
            "time_to_first_token_ratio": round(first / times["to first token"], 3),
            "cache_bytes": shape.bytes(True),
            "peer_cache_bytes": shape.bytes(False),
        }

    return account


def greedy(shape: Shape, batch: int, new_tokens: int = NEW_TOKENS) -> Callable[[], dict[Arm, Work]]:
    """Greedy decoding as a generator's stepper does it, logits through NumPy; the peer has the same weights.

    Both return the ids of the new tokens, [batch, new_tokens].
    """

    def build() -> dict[Arm, Work]:
        from vlm.evaluation.generator import TorchStepper
        from vlm.runtime.generation import Prompt

        torch.manual_seed(0)
        model = shape.language().build(shape.vocabulary()).eval()
        ids = torch.randint(4, shape.vocab_size, (batch, TEXT), generator=torch.Generator().manual_seed(batch))
        prompts = [Prompt(tuple(row), {}) for row in ids.tolist()]
        published = llama(model)

        def ours() -> object:
            stepper = TorchStepper(model)
            tokens = [stepper.start(prompts).argmax(-1).astype(np.int64)]
            while len(tokens) < new_tokens:
                tokens.append(stepper.advance(tokens[-1]).argmax(-1).astype(np.int64))
            return torch.from_numpy(np.stack(tokens, axis=1))

        @torch.no_grad()
        def peer() -> object:
            mask = torch.ones_like(ids)
            return published.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)[:, TEXT:]

        return {"dispatched": ours, "peer": peer}

    return build


def llama(model: LanguageModel) -> Any:
    """`LlamaForCausalLM` with the weights of the model, which no token ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlm.models.layouts.llama import LlamaLayout

    layout = LlamaLayout()
    config = LlamaConfig(**{k: v for k, v in layout.to_config(model.options, model.vocabulary).items() if k != "architectures"})
    published: Any = LlamaForCausalLM(config).eval()
    missing, unknown = published.load_state_dict(layout.to_published(model.state_dict(), model.options), strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"the peer does not take our weights: {unknown or missing}")
    published.tie_weights()
    published.generation_config.eos_token_id = None
    published.generation_config.pad_token_id = SPECIAL["pad"]
    return published


def account_of_greedy(batch: int) -> Callable[[Mapping[Arm, float]], dict[str, object]]:
    def account(times: Mapping[Arm, float]) -> dict[str, object]:
        tokens = batch * NEW_TOKENS
        return {"tokens_per_second": round(tokens / times["dispatched"], 1), "peer_tokens_per_second": round(tokens / times["peer"], 1)}

    return account


def training_step(rows: int = 16) -> Callable[[], dict[Arm, Work]]:
    """One update of a model shaped as vlm-tiny: 64-pixel pictures, 64 visual and 64 text positions, loss on a half."""

    def build() -> dict[Arm, Work]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        table = dict(
            towers={"main": dict(width=192, depth=4, heads=3, image_size=64, patch_size=8)},
            connector={"kind": "mlp"},
            language=LanguageOptions(width=256, depth=4, heads=4, kv_heads=2, ffn_width=704, length=256, vocab_size=4096),
            length=192,
        )
        model = VisionLanguageOptions.model_validate(table).build(VocabularyLayout.of_text(4096, SPECIAL)).train()
        ids = torch.randint(4, 4096, (rows, TEXT), generator=generator)
        ids[:, 2] = SPECIAL["image"]
        numbers, valid = torch.arange(rows), torch.ones(rows, dtype=torch.bool)
        supervised = (torch.arange(TEXT) >= TEXT // 2).expand(rows, -1)
        text = TokenIds(ids, torch.ones_like(ids, dtype=torch.bool), numbers, supervised=supervised)
        pictures = Pictures(torch.rand(rows, 3, 64, 64, generator=generator), valid, numbers)
        batch = Batch({"text": text, "image": pictures}, [str(row) for row in range(rows)], numbers, numbers * 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> object:
            output = model.encode(batch, {"text": frozenset({"vocabulary"})})["text"]
            assert output.layout is not None
            assert output.vocabulary is not None
            chosen = output.layout.label[:, 1:] >= 0
            logits = output.vocabulary.hidden[:, :-1][chosen] @ output.vocabulary.weight.T
            loss = F.cross_entropy(logits, output.layout.label[:, 1:][chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return {"native": with_backend("native", step), "dispatched": step, "peer": with_backend("torch", step)}

    return build


SHAPE = Shape()
DECODER_CASES: tuple[Case, ...] = (
    Case("decoder/prefill/576+64", FULL, prefill(SHAPE), 2.0, native=False, account=account_of_prefill(SHAPE)),
    Case("decoder/answer/576+64+32", FULL, answer(SHAPE), native=False, account=account_of_answer(SHAPE)),
    *(
        Case(f"decoder/greedy/batch-{batch}", TRANSFORMERS, greedy(SHAPE, batch), native=False, account=account_of_greedy(batch))
        for batch in (1, 8)
    ),
    Case("decoder/training-step/vlm-tiny", "the same step on torch operators alone", training_step()),
)
