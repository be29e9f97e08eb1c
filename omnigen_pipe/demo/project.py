"""The demo's workspace: a small model, drawn pictures and a configuration that uses them.

Everything is made on the spot, so the demo needs no network. The configuration is written last:
where it lies, the rest is complete.
"""

from __future__ import annotations

from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe.config import CONFIG_NAME
from omnigen_pipe.demo.model import build_small_omnigen
from omnigen_pipe.demo.pictures import draw_pictures
from omnigen_pipe.progress import Progress

#: The first line of the demo's configuration: tells it from a user's own.
MARK = "# The demo of omnigen-pipe, written by `omnigen-pipe demo`."

#: Lies in the folder while the demo is being written, so that a killed one can be begun again.
_UNFINISHED = ".demo-unfinished"

CONFIGURATION = f"""\
{MARK}
# A small OmniGen with random weights learns 48 drawn pictures: every stage does what it does for
# a real model, in a minute on a CPU. Nothing can be seen in pictures that this model makes.

[model]
pretrained_model_name_or_path = "model"   # a real one: "Shitao/OmniGen-v1-diffusers"

[defaults]
resolution = 128                          # OmniGen-v1 is trained for 1024
resolution_type = "pixel_area"
aspect_bucket_alignment = 16              # small buckets need a fine grid; the default is 64

[[dataset]]
id = "pictures"
instance_data_dir = "pictures"
caption_strategy = "textfile"

[validation]
validation_prompt = "a large red circle left of a small blue square on a white background"

[train]
tracker_run_name = "demo"
max_train_steps = 100
train_batch_size = 4
learning_rate = 1e-3
lr_warmup_steps = 10
gradient_checkpointing = false            # this model is small enough
checkpoint_step_interval = 50
"""


def write_project(root: Path, progress: Progress) -> bool:
    """Write the demo into the folder `root` unless it is there; True when it was written.

    Raises `UsageError` where `root` is a workspace of another kind: nothing of a user's is ever
    overwritten.
    """
    path = root / CONFIG_NAME
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            return False
        raise UsageError(
            f"{path} is not the demo's. Name a new folder for the demo with --workspace."
        )
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file. Name a folder for the demo with --workspace.")
    foreign = [name for name in ("model", "pictures") if _occupied(root / name, root)]
    if foreign:
        raise UsageError(
            f"{root / foreign[0]} is there already and is not the demo's. Name a new folder for "
            "the demo with --workspace."
        )
    progress.note(f"Writing the demo into {root}: a small random OmniGen and 48 pictures.")
    root.mkdir(parents=True, exist_ok=True)
    unfinished = root / _UNFINISHED
    unfinished.touch()
    build_small_omnigen(root / "model")
    draw_pictures(root / "pictures")
    path.write_text(CONFIGURATION, encoding="utf-8")
    unfinished.unlink()
    return True


def _occupied(folder: Path, root: Path) -> bool:
    return folder.exists() and not (root / _UNFINISHED).exists()
