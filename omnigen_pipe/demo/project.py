"""The demo's workspace: drawn pictures, and a configuration that teaches the embedded model.

Nothing is downloaded. The configuration is published last: where it lies, the rest is complete.
"""

from __future__ import annotations

from pathlib import Path

from manifests.errors import UsageError
from manifests.publish import publishing
from omnigen_pipe.config import CONFIG_NAME
from omnigen_pipe.demo.pictures import (
    KNOWN_PICTURES,
    NEW_PICTURES,
    draw_pictures,
    known_scenes,
    new_scenes,
)
from omnigen_pipe.progress import Progress

#: Begins the demo's configuration: tells it from a user's own.
MARK = "# The demo of omnigen-pipe: the embedded model learns a new shape."
#: To be raised whenever the pictures or the configuration change: what one version wrote is not
#: what another would measure.
VERSION = 3

#: Lies in the folder while the demo is being written, so that a killed one can be begun again.
_UNFINISHED = ".demo-unfinished"

CONFIGURATION = f"""\
{MARK} Version {VERSION}.
# The embedded model knows a little world of drawn shapes. Here it learns a new one, the zorp.

[model]
pretrained_model_name_or_path = "embedded"   # a real one: "Shitao/OmniGen-v1-diffusers"

[defaults]
resolution = 64                              # OmniGen-v1 is trained for 1024
resolution_type = "pixel"
aspect_bucket_alignment = 16                 # small buckets need a fine grid; the default is 64
caption_strategy = "textfile"

[[dataset]]
id = "zorps"
instance_data_dir = "zorps"
repeats = 8                                  # about half as often as what is known

[[dataset]]
id = "known"                                 # what the model must not forget
instance_data_dir = "known"
is_regularisation_data = true

[validation]
validation_prompt = "a large red zorp on a white background"

[lokr]
factor = 2                                   # a narrow model needs more of an adapter

[train]
tracker_run_name = "demo"
max_train_steps = 400
train_batch_size = 16
learning_rate = 1e-2
lr_scheduler = "cosine"
lr_warmup_steps = 20
adam_beta2 = 0.99                            # for a short run
caption_dropout_probability = 0.0            # guidance needs the base without a prompt
gradient_checkpointing = false               # this model is small enough
checkpoint_step_interval = 100
"""


def write_project(root: Path, progress: Progress) -> bool:
    """Write the demo into the folder `root` unless it is there; True when it was written.

    Raises `UsageError` where `root` holds anything else, be it another version's demo: nothing of a
    user's is ever overwritten.
    """
    path = root / CONFIG_NAME
    if path.exists():
        first, *_ = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)
        if first == CONFIGURATION.split("\n", 1)[0]:
            return False
        whose = "of another version of omnigen-pipe" if first.startswith(MARK) else "not the demo's"
        raise UsageError(f"{path} is {whose}. Name a new folder for the demo with --workspace.")
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file. Name a folder for the demo with --workspace.")
    unfinished = root / _UNFINISHED
    if root.exists() and not unfinished.exists() and any(root.iterdir()):
        raise UsageError(
            f"{root} holds other files already. Name a new folder for the demo with --workspace."
        )
    progress.note(
        f"Writing the demo into {root}: {NEW_PICTURES} pictures of a new shape, and "
        f"{KNOWN_PICTURES} of what the embedded model knows."
    )
    root.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    draw_pictures(root / "zorps", new_scenes(NEW_PICTURES))
    draw_pictures(root / "known", known_scenes(KNOWN_PICTURES))
    with publishing(root / "staging", path) as staged:
        staged.write_text(CONFIGURATION, encoding="utf-8")
    unfinished.unlink()
    return True
