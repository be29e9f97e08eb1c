"""The workspace: the folder that holds configuration, manifests, shards and runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifests import schema
from manifests.errors import UsageError
from manifests.log import Log
from manifests.snapshot import Snapshot
from omnigen_pipe import config as configuration
from omnigen_pipe.config import CONFIG_NAME, Config, LokrConfig


@dataclass(frozen=True)
class Workspace:
    """A folder and its configuration; the attributes say where each part lies."""

    root: Path
    config: Config

    @classmethod
    def open(cls, root: Path | str) -> Workspace:
        """The workspace at `root`; raises `UsageError` where it or its configuration is not."""
        folder = Path(root).absolute()
        if not folder.is_dir():
            raise UsageError(f"There is no folder {folder}. Make one with `omnigen-pipe init`.")
        return cls(folder, configuration.load(folder / CONFIG_NAME))

    @property
    def staging(self) -> Path:
        """Where unfinished files are written; never read."""
        return self.root / "staging"

    @property
    def maintenance_lock(self) -> Path:
        """The file that merging, `gc` and nothing else locks."""
        return self.root / "manifests" / "maintenance.lock"

    @property
    def latents_folder(self) -> Path:
        """Where shards lie, in a folder per bucket."""
        return self.root / "latents"

    @property
    def files(self) -> Log:
        """What reading each file found."""
        return Log(schema.FILES, self.root / "manifests" / "files", self.staging)

    @property
    def images(self) -> Snapshot:
        """What the last walk found."""
        return Snapshot(schema.IMAGES, self.root / "manifests" / "images.parquet", self.staging)

    @property
    def samples(self) -> Snapshot:
        """What is wanted now."""
        return Snapshot(schema.SAMPLES, self.root / "manifests" / "samples.parquet", self.staging)

    @property
    def latents(self) -> Log:
        """What is encoded."""
        return Log(schema.LATENTS, self.root / "manifests" / "latents", self.staging)

    @property
    def prompts(self) -> Log:
        """What is tokenised."""
        return Log(schema.PROMPTS, self.root / "manifests" / "prompts", self.staging)

    def path(self, text: str) -> Path:
        """A path of the configuration: relative ones start at the workspace."""
        return (self.root / Path(text).expanduser()).absolute()

    def lokr(self) -> LokrConfig:
        """The adapter that the configuration asks for: `[lokr]`, or what `lycoris_config` names.

        Raises `UsageError` where that file cannot be used.
        """
        path = self.config.train.lycoris_config
        return configuration.read_lycoris_config(self.path(path)) if path else self.config.lokr

    def run_folder(self, name: str) -> Path:
        """The folder of the run `name`."""
        return self.root / "runs" / name
