"""Suites of `evaluate` run other commands in processes of their own, as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from offline_lm.errors import UserError


def command(name: str, *arguments: str) -> dict[str, Any]:
    """Another command of ours in a process of its own; what it prints goes to stderr, its JSON object comes back.

    Raises:
        UserError: it did not exit with 0.
    """
    run = [sys.executable, "-m", f"offline_lm.{name}", *arguments, "json=true"]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(run[1:])}` exited with {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])
