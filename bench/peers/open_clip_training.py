"""The same small CLIP trained by open_clip, on the same pictures, texts, order and schedule.

Runs under any Python that has torch, open_clip_torch, numpy and Pillow; vlm is not needed there. Two uses:

    python -m vlm.bench.peers.open_clip_step --peer OTHER/bin/python        one training step, interleaved pairs
    OTHER/bin/python bench/peers/open_clip_training.py train BATCHES OUT    a whole run over stored batches

Model: width 192, depth 4, patch 8, 64 pixels; text width 192, depth 4. AdamW 1e-3, weight decay 0.1, cosine, warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def build(vocabulary: int, length: int, seed: int):  # type: ignore[no-untyped-def]
    """(model, loss, optimiser) with open_clip's own initialisation and parameter groups."""
    import torch
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=192,
        vision_cfg=CLIPVisionCfg(layers=4, width=192, head_width=64, patch_size=8, image_size=64),
        text_cfg=CLIPTextCfg(context_length=length, vocab_size=vocabulary, width=192, heads=3, layers=4),
    )
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    names = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in names]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-3, betas=(0.9, 0.98), eps=1e-6
    )
    return model, ClipLoss(), optimizer


def step(model, loss, optimizer, pixels, ids, amp: bool = False) -> float:  # type: ignore[no-untyped-def]
    """One update as open_clip's trainer does it (amp: its `amp_bf16`); pixels uint8 [n, 3, 64, 64], ids [n, T]."""
    import torch

    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        image, text, scale = model((pixels.float() / 255 - mean) / std, ids)
        value = loss(image, text, scale)
    value.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return float(value)


def serve_steps(threads: int, batch: int, length: int) -> None:
    """One line in, one timed step out: how the interleaved comparison drives it."""
    import torch

    torch.set_num_threads(threads)
    model, loss, optimizer = build(4096, length, 0)
    pixels = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
    ids = torch.randint(4, 4096, (batch, length))
    ids[:, length - 1] = 4095
    for _ in sys.stdin:
        started = time.perf_counter()
        step(model, loss, optimizer, pixels, ids)
        print(time.perf_counter() - started, flush=True)


def train(batches: Path, output: Path, steps: int, warmup: int, seed: int, threads: int, amp: bool) -> None:
    """Train over `batches/pixels.npy`, `ids.npy`, `order.npy` and write embeddings of `val_pixels.npy`, `val_ids.npy`."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    pixels, ids = np.load(batches / "pixels.npy", mmap_mode="r"), np.load(batches / "ids.npy")
    order = np.load(batches / f"order-{seed}.npy")
    about = json.loads((batches / "about.json").read_text())
    model, loss, optimizer = build(about["vocabulary"], ids.shape[1], seed)
    for number in range(steps):
        rate = (number + 1) / warmup if number < warmup else 0.5 * (1 + math.cos(math.pi * (number - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        rows = order[number]
        value = step(model, loss, optimizer, torch.from_numpy(pixels[rows]), torch.from_numpy(ids[rows]), amp)
        if number % 20 == 0 or number == steps - 1:
            print(f"step {number + 1}/{steps} loss {value:.4f}", file=sys.stderr, flush=True)
    model.eval()
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        val = torch.from_numpy(np.load(batches / "val_pixels.npy"))
        image = torch.cat([model.encode_image((part.float() / 255 - mean) / std, normalize=True) for part in val.split(256)])
        ids = torch.from_numpy(np.load(batches / "val_ids.npy"))
        text = torch.cat([model.encode_text(part, normalize=True) for part in ids.split(256)])
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "image.npy", image.numpy())
    np.save(output / "text.npy", text.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps")
    steps.add_argument("--threads", type=int, default=2)
    steps.add_argument("--batch", type=int, default=256)
    steps.add_argument("--length", type=int, default=32)
    whole = commands.add_parser("train")
    whole.add_argument("batches", type=Path)
    whole.add_argument("output", type=Path)
    whole.add_argument("--steps", type=int, default=300)
    whole.add_argument("--warmup", type=int, default=30)
    whole.add_argument("--seed", type=int, default=0)
    whole.add_argument("--threads", type=int, default=2)
    whole.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    given = parser.parse_args()
    if given.command == "steps":
        serve_steps(given.threads, given.batch, given.length)
    else:
        train(given.batches, given.output, given.steps, given.warmup, given.seed, given.threads, given.amp)


if __name__ == "__main__":
    main()
