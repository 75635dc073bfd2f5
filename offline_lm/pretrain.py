"""``python -m offline_lm.pretrain``: the small language model that ships as `model=reader`, from nothing but a seed."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from offline_lm import cli
from offline_lm.models import backbone, devices, pretraining


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("pretrain", pretrain, argv)


def pretrain(cfg: DictConfig) -> dict[str, Any]:
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = devices.device(cfg.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the two rows of an update have a thread each
    model, tokenizer = backbone.tiny(
        pretraining.texts(cfg.seed, 4000), vocab_size=cfg.vocab_size, width=cfg.width, layers=cfg.layers,
        heads=cfg.heads, seed=cfg.seed,
    )  # fmt: skip
    settings = {k: cfg[k] for k in ("seed", "tokens", "batch_tokens", "easy", "lr", "width", "layers", "heads")}
    key = hashlib.sha256(json.dumps([settings, tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()[:12]
    began = time.monotonic()
    with Curves(folder / "curves.csv", cfg.tokens, cfg.batch_tokens) as curves:
        judge = pretraining.train(
            model.to(device), tokenizer, tokens=cfg.tokens, batch_tokens=cfg.batch_tokens, easy=cfg.easy, lr=cfg.lr,
            seed=cfg.seed, at=folder / f"{key}.state", on_step=curves.step,
        )  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    model.eval().to(getattr(torch, cfg.dtype))
    backbone.save(model, tokenizer, folder)
    found = judged(model.float(), tokenizer, judge, cfg.seed, cfg.held_out, cfg.batch_tokens)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for skill, (n, share) in found.items():
        print(f"{skill:10} {share:6.1%} of {n}")
    print(f"{folder / 'model.safetensors'}: {minutes:.0f} min, sha256 {digest}")
    return {"sha256": digest, "minutes": minutes, "right": {skill: share for skill, (_, share) in found.items()}}


@torch.no_grad()
def judged(
    model: Any, tokenizer: Any, judge: pretraining.Judge, seed: int, pages: int, batch_tokens: int
) -> dict[str, tuple[int, float]]:
    """On pages of another seed: for each skill how many questions there were, and how many were answered right."""
    asked, right = Counter[str](), Counter[str]()
    seen = number = 0
    while seen < pages:
        row = pretraining.sheet(tokenizer, -1 - seed, number, easy=0.0, tokens=batch_tokens)
        _, logits = pretraining.loss(model, judge, row)
        for skill, ok in pretraining.chosen(logits, row):
            asked[skill] += 1
            right[skill] += ok
        seen, number = seen + len(row.layout.trunks), number + 1
    return {skill: (n, right[skill] / n) for skill, n in sorted(asked.items())}


class Curves:
    """Means over every hundredth of the training, written as a table as they come."""

    def __init__(self, path: Path, tokens: int, batch_tokens: int) -> None:
        self.path, self.tokens, self.part = path, tokens, 0
        self.file = path.open("a", newline="")
        self.rows = csv.writer(self.file)
        self.bar = tqdm(total=tokens, desc="pretrain", unit="token", unit_scale=True)
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.right: dict[str, list[bool]] = defaultdict(list)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        self.bar.close()

    def step(self, done: float, parts: dict[str, float], answered: Iterable[tuple[str, bool]]) -> None:
        self.bar.update(int(done * self.tokens) - self.bar.n)
        for name, value in parts.items():
            self.parts[name].append(value)
        for skill, ok in answered:
            self.right[skill].append(ok)
        if math.floor(100 * done) > self.part:
            self.part = math.floor(100 * done)
            for kind, means in (("loss", self.parts), ("right", self.right)):
                for name, seen in sorted(means.items()):
                    self.rows.writerow([int(done * self.tokens), kind, name, f"{sum(seen) / len(seen):.4f}"])
            self.file.flush()
            self.parts.clear()
            self.right.clear()


if __name__ == "__main__":
    raise SystemExit(main())
