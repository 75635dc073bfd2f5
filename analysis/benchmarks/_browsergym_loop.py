"""BrowserGym's own loop over MiniWoB tasks, run by `collect.py` with a Python that has `browsergym-miniwob`.

Arguments: one JSON object with `url` (of the tasks), `chromium`, `tasks`, `seeds`, `steps`, `delay` and `slow_mo`
(null: BrowserGym's). Prints one with the seconds, and each episode's rewards.
"""

from __future__ import annotations

import json
import re
import sys
import time
from functools import partialmethod
from typing import Any

import browsergym.miniwob  # pyright: ignore[reportMissingImports]  # noqa: F401  (it registers the tasks)
import gymnasium as gym
from browsergym.utils.obs import flatten_axtree_to_str  # pyright: ignore[reportMissingImports]
from playwright.sync_api import BrowserType


def main() -> None:
    given = json.loads(sys.argv[1])
    # the window of its chat, too, wants a browser, and takes no option that says which
    BrowserType.launch = partialmethod(BrowserType.launch, executable_path=given["chromium"])  # type: ignore[method-assign]
    options: dict[str, Any] = {"headless": True, "task_kwargs": {"base_url": given["url"]}}
    if given["delay"] is not None:
        options |= {"pre_observation_delay": given["delay"], "slow_mo": given["slow_mo"]}
    rewards: dict[str, list[float]] = {}
    steps = 0
    began = time.perf_counter()
    for task in given["tasks"]:
        env = gym.make(f"browsergym/miniwob.{task}", **options)
        for seed in given["seeds"]:
            page, _ = env.reset(seed=seed)
            earned = []
            for t in range(given["steps"]):
                # a step costs what an agent pays: the page as text
                text = flatten_axtree_to_str(page["axtree_object"])
                buttons = re.findall(r"\[(\w+)\] button", text)
                action = f"click('{buttons[(len(task) + t) % len(buttons)]}')" if buttons else "noop()"
                page, reward, done, cut, _ = env.step(action)
                steps += 1
                earned.append(float(reward > 0))  # type: ignore[operator]
                if done or cut:
                    break
            rewards[f"{task} {seed}"] = earned
        env.close()
    print(json.dumps({"seconds": time.perf_counter() - began, "steps": steps, "rewards": rewards}))


if __name__ == "__main__":
    main()
