"""Make the embedded model from nothing: `python -m omnigen_pipe.embedded.make FOLDER`.

A tokenizer from the world's sentences; a VAE from drawings; then the project's own stages over
thousands of drawn pictures, and the pretraining of the transformer on what they made. Whatever
lies in FOLDER already is not made again, so the same command goes on after a stop. The finished
model is FOLDER/finished. `--card` judges a finished model again.

Exit status: 0 done, 1 failed, 2 wrong usage, a failed stage's own, 128 + N when a signal N ended
it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from manifests.errors import PipeError
from manifests.lock import sign
from manifests.publish import publishing
from omnigen_pipe.embedded.layout import write_scheduler_and_index
from omnigen_pipe.embedded.learned import draw_learned
from omnigen_pipe.embedded.making import PLAN_NAME, STAGING_NAME, Making, begun, note_versions
from omnigen_pipe.embedded.tokenizer import VOCABULARY, build_tokenizer, world_sentences
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.template import CFG_PROMPT, INSTRUCTION
from omnigen_pipe.stop import Stopped, stopped_by_signal

#: The largest number that an option may be: torch's generators take no larger seed than 64 bits.
_GREATEST = 2**62
_STAGES = ("discover", "bucket", "encode-vae", "tokenize")


class StageFailed(PipeError):
    """A stage's command failed; its own exit status is passed on."""

    def __init__(self, stage: str, status: int) -> None:
        if status < 0:
            how, self.exit_status = f"was ended by {signal.Signals(-status).name}", 128 - status
        else:
            how, self.exit_status = f"failed with status {status}; its own message says why", status
        super().__init__(
            f"The stage `{stage}` {how}. What was done before is kept: run the same command again "
            "to go on."
        )


def make(folder: Path, making: Making, progress: Progress) -> Path:
    """Make the model in `folder` as far as it is not made; returns the finished model's folder.

    Raises `UsageError` where `folder` was begun otherwise or another process works in it,
    `PipeError` where something fails, and `Stopped` where a signal asks for it. What was done is
    kept.
    """
    finished = folder / "finished"
    from omnigen_pipe.embedded.recipe import recipe

    with begun(folder, making, recipe(making)) as lock:
        if not finished.exists():
            _make_parts(folder, making, finished, lock, progress)
        from omnigen_pipe.embedded.card import CARD_NAME, write_card

        if not (finished / CARD_NAME).exists():
            write_card(finished, folder / STAGING_NAME, progress)
    return finished


def _make_parts(
    folder: Path, making: Making, finished: Path, lock: int, progress: Progress
) -> None:
    """Make the parts one after the other, and publish the `finished` model, without its card.

    `lock` is the handle of the folder's lock.
    """
    import diffusers
    import torch

    from omnigen_pipe.embedded import pretraining
    from omnigen_pipe.workspace import Workspace

    note_versions(folder, f"torch {torch.__version__} and diffusers {diffusers.__version__}")
    model, staging = folder / "model", folder / STAGING_NAME  # the transformer there is untrained
    _once(model / "tokenizer", staging, lambda path: _make_tokenizer(path, making))
    _once(model / "vae", staging, lambda path: _make_vae(path, folder, making, progress))
    _once(
        model / "transformer",
        staging,
        lambda path: save_part(pretraining.new_transformer(VOCABULARY, making.seed), path),
    )
    draw_learned(folder, making, progress)
    for stage in _STAGES:
        run_stage(stage, folder, lock)
    trained = pretraining.pretrain(
        Workspace.open(folder),
        model / "transformer",
        folder / "pretraining.pt",
        making.pictures,
        progress,
    )

    def assemble(path: Path) -> None:
        save_part(trained.to(torch.float16), path / "transformer")
        for part in ("vae", "tokenizer"):
            shutil.copytree(model / part, path / part)
        write_scheduler_and_index(path)
        _write_defaults(path)
        shutil.copyfile(folder / PLAN_NAME, path / PLAN_NAME)

    _once(finished, staging, assemble)


def _once(final: Path, staging: Path, write: Callable[[Path], object]) -> None:
    """Publish as `final` the folder that `write` fills, whole or not at all; nothing where it is
    there. Anybody may read what is published."""
    if final.exists():
        return
    with publishing(staging, final) as path:
        path.mkdir()
        write(path)
        for each in [path, *path.rglob("*")]:
            each.chmod(0o755 if each.is_dir() else 0o644)


def _make_tokenizer(folder: Path, making: Making) -> None:
    # One token for what every prompt begins with: its words would be a third of all tokens.
    build_tokenizer(folder, world_sentences(making.seed), VOCABULARY, whole=INSTRUCTION)


def _make_vae(path: Path, folder: Path, making: Making, progress: Progress) -> None:
    import torch

    from omnigen_pipe.embedded import autoencoder

    state, staging = folder / "vae.pt", folder / STAGING_NAME
    vae = autoencoder.train_vae(state, staging, making.seed, making.vae_steps, progress)
    progress.note(f"The VAE reaches {autoencoder.psnr(vae, making.seed):.1f} dB.")
    # Rounded as it is shipped: the transformer learns the latents that it will meet.
    save_part(vae.to(torch.float16), path)


def run_stage(stage: str, folder: Path, lock: int) -> None:
    """Run a stage on the workspace `folder` in a process of its own.

    It holds the folder's lock, which is open as `lock`, too: where this process is killed, nobody
    else works in the folder until the stage has ended. Raises `StageFailed`, and `Stopped` where
    a signal came: the stage is given it, too, and time to publish what it has done.
    """
    # In a session of its own Ctrl-C does not reach it at once: every signal comes from here, once.
    with subprocess.Popen(
        _command(stage, folder), start_new_session=True, pass_fds=[lock]
    ) as process:
        try:
            sign(lock, process.pid)
            status = process.wait()
        except Stopped as stop:
            process.send_signal(stop.signal)
            try:
                process.wait()
            except Stopped:
                process.kill()
                raise
            raise
        finally:
            sign(lock)
    if status != 0:
        raise StageFailed(stage, status)


def _command(stage: str, folder: Path) -> Sequence[str]:
    return [sys.executable, "-m", "omnigen_pipe.cli", stage, "-w", str(folder)]


def save_part(part: Any, folder: Path) -> None:
    """Save a part of the model in diffusers' layout, without the name of the folder where it was
    made."""
    part.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_defaults(folder: Path) -> None:
    """What `generate` takes where nothing is said."""
    defaults = {
        "width": 64,
        "height": 64,
        "num_inference_steps": 10,
        "guidance_scale": 2.5,
        "negative_prompt": CFG_PROMPT,
    }
    text = json.dumps(defaults, indent=2) + "\n"
    (folder / "generation.json").write_text(text, encoding="utf-8")


def main() -> None:
    """The command line; errors that a user can act on print one message."""
    try:
        with stopped_by_signal():
            _run(_parser().parse_args())
    except Stopped as stop:
        name = signal.Signals(stop.signal).name
        print(
            f"Stopped by {name}. What was done is kept: run the same command again to go on.",
            file=sys.stderr,
        )
        sys.exit(128 + stop.signal)
    except PipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m omnigen_pipe.embedded.make",
        description="Make the embedded model. A folder goes on only with the options that it was "
        "begun with.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to work; the same folder goes on")
    usual = Making()
    parser.add_argument(
        "--seed", type=_within(0, _GREATEST), default=usual.seed, help="of everything"
    )
    parser.add_argument(
        "--vae-steps",
        type=_within(1, _GREATEST),
        default=usual.vae_steps,
        help="of the VAE's training",
    )
    parser.add_argument(
        "--pictures",
        type=_within(1, _GREATEST),
        default=usual.pictures,
        help="that are drawn and learned",
    )
    parser.add_argument(
        "--steps", type=_within(1, _GREATEST), default=usual.steps, help="of the pretraining"
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="only write the card of the finished model FOLDER again; its plan.json says how it "
        "was made, and no other option is used",
    )
    return parser


def _within(least: int, greatest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= greatest:
            raise argparse.ArgumentTypeError(f"{value} is not within {least} … {greatest}")
        return value

    return number


def _run(given: argparse.Namespace) -> None:
    if given.card:
        from omnigen_pipe.embedded.card import write_card

        with tempfile.TemporaryDirectory(dir=given.folder.absolute().parent) as staging:
            write_card(given.folder, Path(staging), Progress())
        print(given.folder)
        return
    making = Making(given.seed, given.vae_steps, given.pictures, given.steps)
    print(make(given.folder, making, Progress()))


if __name__ == "__main__":
    main()
