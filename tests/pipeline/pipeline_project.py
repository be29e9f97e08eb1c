"""A workspace driven through the real command line, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from omnigen_pipe.cli import main

#: The command as a user gets it: a process of its own.
COMMAND = [sys.executable, "-c", "from omnigen_pipe.cli import main; main()"]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Project:
    """A workspace folder and the command line in it."""

    root: Path

    def run(self, *arguments: str, status: int | None = 0, process: bool = False) -> Ended:
        """Run `omnigen-pipe ARGUMENTS` here; fails unless it ends with `status` (any, if None).

        Within this process, which saves the seconds of importing torch, unless `process`.
        """
        ended = self._process(arguments) if process else self._here(arguments)
        assert status in (None, ended.status), f"{ended.status}\n{ended.stdout}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended

    def _process(self, arguments: tuple[str, ...]) -> Ended:
        done = subprocess.run([*COMMAND, *arguments], cwd=self.root, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    def _here(self, arguments: tuple[str, ...]) -> Ended:
        stdout, stderr = io.StringIO(), io.StringIO()
        before = Path.cwd()
        os.chdir(self.root)
        try:
            with (
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
                mock.patch.object(sys, "argv", ["omnigen-pipe", *arguments]),
            ):
                try:
                    main()
                    code: object = 0
                except SystemExit as ended:
                    code = ended.code
        finally:
            os.chdir(before)
        return Ended(code if isinstance(code, int) else 0, stdout.getvalue(), stderr.getvalue())

    def json(self, *arguments: str, status: int = 0, process: bool = False) -> Any:
        """The same with `--json`, parsed."""
        return json.loads(self.run(*arguments, "--json", status=status, process=process).stdout)


def configured(
    root: Path,
    model: Path,
    images: Path | str,
    dataset: dict[str, object] | None = None,
    train: dict[str, object] | None = None,
    extra: str = "",
) -> Project:
    """The workspace `root`, configured for `images` and the model in the folder `model`."""
    root.mkdir(exist_ok=True)
    dataset_options = {
        "id": "main",
        "instance_data_dir": str(images),
        "resolution": 64,
        "aspect_bucket_alignment": 16,
        **(dataset or {}),
    }
    train_options = {
        "max_train_steps": 4,
        "train_batch_size": 2,
        "lr_warmup_steps": 0,
        "report_to": "none",
        **(train or {}),
    }
    lines = ["[model]", f"pretrained_model_name_or_path = {toml_text(str(model))}"]
    lines += ["[[dataset]]"]
    lines += [f"{key} = {toml_text(value)}" for key, value in dataset_options.items()]
    lines += ["[train]"]
    lines += [f"{key} = {toml_text(value)}" for key, value in train_options.items()]
    (root / "omnigen-pipe.toml").write_text("\n".join([*lines, extra, ""]), encoding="utf-8")
    return Project(root)


def toml_text(value: object) -> str:
    """A value as TOML writes it (JSON's way is TOML's for texts, numbers and lists)."""
    return json.dumps(value)
