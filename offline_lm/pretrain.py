"""``python -m offline_lm.pretrain``: a small language model for `model=reader`, from nothing but a seed."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from offline_lm import cli
from offline_lm.errors import UserError
from offline_lm.models import backbone, devices, pretraining


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("pretrain", pretrain, argv)


def pretrain(cfg: DictConfig) -> dict[str, Any]:
    folder, device = checked(cfg)
    if cfg.start is None:
        model, tokenizer = backbone.tiny(
            pretraining.texts(cfg.seed, 4000), vocab_size=cfg.vocab_size, width=cfg.width, layers=cfg.layers,
            heads=cfg.heads, seed=cfg.seed,
        )  # fmt: skip
    else:
        model, tokenizer = backbone.load(cfg.start, "float32", "start")
    names = "seed tokens batch_tokens easy grounding lr width layers heads start"
    settings = {name: cfg[name] for name in names.split()}
    key = hashlib.sha256(json.dumps([settings, tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()[:12]
    state = folder / f"{key}.state"
    if others := sorted(set(folder.glob("*.state")) - {state}):
        raise UserError(
            f"output={folder} holds a training that was stopped under other settings ({others[0].name}): call it with"
            " those to go on, delete that file, or name another folder"
        )
    began = time.monotonic()
    with Curves(folder / "curves.csv", cfg.tokens) as curves:
        judge = pretraining.train(
            model.to(device), tokenizer, tokens=cfg.tokens, batch_tokens=cfg.batch_tokens, easy=cfg.easy,
            grounding=cfg.grounding, lr=cfg.lr, seed=cfg.seed, at=state, on_step=curves.step,
        )  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    model.eval().to(getattr(torch, cfg.dtype))
    backbone.save(model, tokenizer, folder)
    found = judged(model.float(), tokenizer, judge, cfg.seed, cfg.held_out, cfg.grounding > 0, cfg.batch_tokens)
    state.unlink(missing_ok=True)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for skill, (n, share) in found.items():
        print(f"{skill:10} {share:6.1%} of {n}")
    print(f"{folder / 'model.safetensors'}: {minutes:.0f} min, sha256 {digest}")
    return {"sha256": digest, "minutes": minutes, "right": {skill: share for skill, (_, share) in found.items()}}


def checked(cfg: DictConfig) -> tuple[Path, torch.device]:
    """The folder to write to and the device, after every mistake that can be seen before the work begins.

    Raises:
        UserError: a value of a wrong type or range, an unknown device, or a folder that cannot be written.
    """
    for least, keys in ((0, "seed held_out"), (1, "tokens vocab_size width layers heads"), (2, "batch_tokens")):
        for key in keys.split():
            if type(cfg[key]) is not int or cfg[key] < least:
                raise UserError(f"{key}={cfg[key]}: a whole number from {least} is wanted")
    for key, most in (("easy", 1.0), ("lr", math.inf)):
        if type(cfg[key]) not in (int, float) or not 0 < cfg[key] <= most:
            raise UserError(f"{key}={cfg[key]}: a number above 0 is wanted" + ", at most 1" * (most == 1))
    if type(cfg.grounding) not in (int, float) or not 0 <= cfg.grounding <= 1:
        raise UserError(f"grounding={cfg.grounding}: a number from 0 to 1 is wanted")
    if not backbone.fits_heads(cfg.width, cfg.heads):
        raise UserError(f"width={cfg.width}: a multiple of twice heads={cfg.heads} is wanted, 4 a head at least")
    if cfg.dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"dtype={cfg.dtype}: float32, float16 or bfloat16 is wanted")
    if cfg.start is not None:
        backbone.check(cfg.start, "start")
    device = devices.device(cfg.device)
    folder = Path(cfg.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"output={folder} cannot be written: {error.strerror}") from error
    return folder, device


@torch.no_grad()
def judged(
    model: Any, tokenizer: Any, judge: pretraining.Judge, seed: int, pages: int, grounded: bool, batch_tokens: int
) -> dict[str, tuple[int, float]]:
    """On pages of another seed: for each skill how many questions there were, and how many were answered right."""
    asked, right = Counter[str](), Counter[str]()
    seen = number = 0
    while seen < pages:
        row = pretraining.sheet(tokenizer, -1 - seed, number, easy=0.0, grounded=grounded, tokens=batch_tokens)
        _, logits = pretraining.loss(model, judge, row)
        for skill, ok in pretraining.chosen(logits, row):
            asked[skill] += 1
            right[skill] += ok
        seen, number = seen + len(row.layout.trunks), number + 1
    return {skill: (n, right[skill] / n) for skill, n in sorted(asked.items())}


class Curves:
    """Means over every hundredth of the training, written as a table as they come.

    Training goes on at the end of a hundredth: what an earlier call wrote until there stays.
    """

    def __init__(self, path: Path, tokens: int) -> None:
        self.path, self.tokens = path, tokens
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.right: dict[str, list[bool]] = defaultdict(list)

    def __enter__(self) -> Curves:
        self.bar = tqdm(total=self.tokens, desc="pretrain", unit="token", unit_scale=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def step(self, update: int, of: int, parts: dict[str, float], answered: Iterable[tuple[str, bool]]) -> None:
        if self.bar.n == 0:
            self._begin(int((update - 1) / of * self.tokens))
        tokens = int(update / of * self.tokens)
        self.bar.update(tokens - self.bar.n)
        for name, value in parts.items():
            self.parts[name].append(value)
        for skill, ok in answered:
            self.right[skill].append(ok)
        if 100 * update // of > 100 * (update - 1) // of:
            with self.path.open("a", newline="") as file:
                rows = csv.writer(file)
                for kind, means in (("loss", self.parts), ("right", self.right)):
                    for name, seen in sorted(means.items()):
                        rows.writerow([tokens, kind, name, f"{sum(seen) / len(seen):.4f}"])
            self.parts.clear()
            self.right.clear()

    def _begin(self, tokens: int) -> None:
        """Keep the rows up to there; none if training begins."""
        kept: list[list[str]] = []
        if tokens and self.path.exists():
            with self.path.open(newline="") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= tokens]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([["tokens", "kind", "name", "mean"], *kept])
        self.bar.initial = self.bar.n = tokens


if __name__ == "__main__":
    raise SystemExit(main())
