"""The demo's workspace: drawn pictures, and a configuration that teaches the embedded model.

Nothing is downloaded. Each folder of pictures appears whole. The configuration is published last:
where it lies, the rest is complete.
"""

from __future__ import annotations

from pathlib import Path

from manifests.errors import UsageError
from manifests.publish import make_folder, publishing
from omnigen_pipe.config import CONFIG_NAME
from omnigen_pipe.demo.folder import MARK, STAGING, UNFINISHED, check_free, is_written
from omnigen_pipe.demo.pictures import (
    KNOWN_PICTURES,
    NEW_PICTURES,
    draw_pictures,
    known_scenes,
    new_scenes,
)
from omnigen_pipe.progress import Progress

#: To be raised whenever the pictures or the configuration change: what one version wrote is not
#: what another would measure.
VERSION = 4

_FIRST_LINE = f"{MARK} Version {VERSION}."

CONFIGURATION = f"""\
{_FIRST_LINE}
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
max_train_steps = 180
train_batch_size = 16
learning_rate = 5e-3
lr_scheduler = "cosine"
lr_warmup_steps = 20
adam_beta2 = 0.99                            # for a short run
caption_dropout_probability = 0.0            # guidance needs the base without a prompt
gradient_checkpointing = false               # this model is small enough
checkpoint_step_interval = 60
"""


def write_project(root: Path, progress: Progress) -> bool:
    """Write the demo into the folder `root` unless it is there; True when it was written.

    Each folder of pictures appears whole, so one that a killed start has left is taken as it is.
    Raises `UsageError` where `root` holds anything else, be it another version's demo, or cannot
    be written, and `WriteError` where the disk is full: nothing of a user's is ever overwritten,
    taken for the demo's, or deleted.
    """
    path, staging = root / CONFIG_NAME, root / STAGING
    try:
        if is_written(path, _FIRST_LINE):
            return False
        check_free(root, _FIRST_LINE, {"zorps": NEW_PICTURES, "known": KNOWN_PICTURES})
        make_folder(root)
    except OSError as error:
        raise UsageError(
            f"--workspace {root} cannot be used: {error.strerror}. Name another folder for the "
            "demo."
        ) from error
    progress.note(
        f"Writing the demo into {root}: {NEW_PICTURES} pictures of a new shape, and "
        f"{KNOWN_PICTURES} of what the embedded model knows."
    )
    unfinished = root / UNFINISHED
    with publishing(staging, unfinished) as staged:
        staged.write_text(_FIRST_LINE + "\n", encoding="utf-8")
    for name, scenes in (
        ("zorps", new_scenes(NEW_PICTURES)),
        ("known", known_scenes(KNOWN_PICTURES)),
    ):
        if not (root / name).exists():
            with publishing(staging, root / name) as folder:
                draw_pictures(folder, scenes)
    with publishing(staging, path) as staged:
        staged.write_text(CONFIGURATION, encoding="utf-8")
    unfinished.unlink(missing_ok=True)
    return True
