"""The policies that `collect` knows by name. torch is imported where one needs it: most do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from offline_lm._collect_endpoint import Endpoint
from offline_lm.envs import scripted
from offline_lm.envs.policies import Chooser, Policy, uniform
from offline_lm.envs.written import Written
from offline_lm.errors import UserError

NAMES = ("random", "scripted", "run:RUN", "lm:MODEL", "openai:MODEL")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a policy acts, as conf/collect.yaml has it and explains it.

    Raises:
        UserError: a number out of range.
    """

    env: str
    store: str
    epsilon: float = 0
    temperature: float = 0
    candidates: str | None = None
    n: int = 1
    critic: str | None = None
    repeats: bool = False
    max_tokens: int = 64
    page_chars: int = 16_000
    base_url: str | None = None
    timeout_s: float = 60
    retries: int = 4
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in ("epsilon", "temperature", "timeout_s", "retries"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not value >= 0 or (key == "epsilon" and value > 1):
                raise UserError(
                    f"{key}={value}: a {'chance from 0 to 1' if key == 'epsilon' else 'number from 0'} is wanted"
                )
        for key in ("n", "max_tokens", "page_chars"):
            if type(value := getattr(self, key)) is not int or value < 1:
                raise UserError(f"{key}={value}: a whole number from 1 is wanted")
        if not isinstance(self.repeats, bool):
            raise UserError(f"repeats={self.repeats}: true or false is wanted")
        if self.candidates not in (None, "page", "none"):
            raise UserError(f"candidates={self.candidates}: there are page and none")

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the settings that a configuration holds."""
        return {f.name: cfg[f.name] for f in fields(cls) if f.name in cfg}


def named(name: str, **settings: Any) -> Policy:
    """The policy that a name means, with what `Settings` takes.

    - ``random``, and ``scripted`` (MiniWoB's rules).
    - ``run:RUN`` of a critic: the page's action of the greatest Q.
    - ``run:RUN`` of an actor: among the page's actions, or with ``candidates=none`` what it writes.
    - ``lm:MODEL`` (a folder, a hub name, or ``run:RUN``, an actor) and ``openai:MODEL``: what a language model writes.

    What is written may be the best of ``n`` samples by ``critic=RUN``.

    Raises:
        UserError: an unknown name, settings out of range or that do not go together, a run that is no such one.
    """
    cfg = Settings(**settings)
    kind, _, what = name.partition(":")
    if name in ("random", "scripted"):
        _refuse_samples(cfg, f"policy={name} writes none")
        if name == "random":
            return Chooser("random", uniform)
        if cfg.env != "miniwob":
            raise UserError(
                f"policy=scripted: its rules are for env=miniwob, not env={cfg.env}; policy=random is for all"
            )
        return Chooser("scripted", scripted.probabilities, cfg.epsilon)
    if kind not in ("run", "lm", "openai") or not what:
        raise UserError(f"policy={name}: there are {', '.join(NAMES)}")
    if kind == "run":
        from offline_lm import _collect_models as models

        folder, holds = models.kind_of(what, cfg.store)
        print(f"policy={name}: {folder.name}, {'an actor' if holds == 'actor' else 'a critic'}")
        if cfg.candidates != "none":
            _refuse_samples(cfg, "a run chooses among the page's actions; candidates=none lets an actor write")
            return _among(cfg, folder, holds)
        kind, what = "lm", f"run:{folder}"
    elif cfg.candidates == "page":
        raise UserError(f"policy={name} writes its actions; an actor, policy=run:RUN, chooses among the page's")
    return _written(cfg, kind, what)


def _among(cfg: Settings, folder: Path, holds: str) -> Policy:
    """A run's, among the page's actions."""
    from offline_lm import _collect_models as models
    from offline_lm.models import devices

    device = devices.device(cfg.device)
    if holds == "critic":
        critic = models.judge(str(folder), cfg.store, device)
        return models.ranked(critic, epsilon=cfg.epsilon, temperature=cfg.temperature, repeats=cfg.repeats)
    policy, model = models.actor(folder, device)
    return models.Actor(folder.name, policy, cfg.temperature, cfg.epsilon, model)


def _written(cfg: Settings, kind: str, what: str) -> Written:
    """Of a language model."""
    from offline_lm import _collect_models as models
    from offline_lm.models import devices

    if cfg.epsilon:
        raise UserError(f"epsilon={cfg.epsilon}: a policy that writes its actions explores by temperature=")
    if (cfg.n == 1) != (cfg.critic is None):
        raise UserError(f"n={cfg.n}, critic={cfg.critic}: a critic chooses one of several samples, such as n=8")
    if cfg.n > 1 and not cfg.temperature:
        raise UserError(f"n={cfg.n}: samples at temperature=0 are all alike; give temperature=1")
    device = devices.device(cfg.device)
    judge = None if cfg.critic is None else models.judge(cfg.critic, cfg.store, device)
    shared: dict[str, Any] = {"temperature": cfg.temperature, "max_tokens": cfg.max_tokens}
    if kind == "openai":
        proposer = Endpoint(
            what, base_url=cfg.base_url, page_chars=cfg.page_chars, timeout_s=cfg.timeout_s, retries=int(cfg.retries),
            extra_body=dict(cfg.extra_body), **shared,
        )  # fmt: skip
    elif what.startswith("run:"):
        folder, holds = models.kind_of(what.removeprefix("run:"), cfg.store)
        if holds != "actor":
            raise UserError(f"{what}: {folder.name} is a {holds}, and only an actor writes actions")
        policy, model = models.actor(folder, device)
        proposer = models.Writer(f"free-{folder.name}", policy, model=model, page_chars=None, **shared)
    else:
        policy, model = models.pretrained(what, device)
        proposer = models.Writer(f"lm-{model}", policy, model=model, page_chars=cfg.page_chars, **shared)
    return Written(proposer, cfg.n, judge)


def _refuse_samples(cfg: Settings, why: str) -> None:
    if cfg.n != 1 or cfg.critic is not None:
        raise UserError(f"n={cfg.n}, critic={cfg.critic}: samples for a critic to choose from are written, and {why}")
