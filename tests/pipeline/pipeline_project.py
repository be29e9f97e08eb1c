"""A workspace driven through the real command line, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The command as a user gets it: a process of its own.
COMMAND = [sys.executable, "-c", "from omnigen_pipe.cli import main; main()"]


@dataclass(frozen=True)
class Project:
    """A workspace folder and the command line in it."""

    root: Path

    def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `omnigen-pipe ARGUMENTS` here; fails unless it ends with `status`."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.root,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, status: int = 0) -> Any:
        """The same with `--json`, parsed."""
        return json.loads(self.run(*arguments, "--json", status=status).stdout)


def toml_text(value: object) -> str:
    """A value as TOML writes it (JSON's way is TOML's for texts, numbers and lists)."""
    return json.dumps(value)
