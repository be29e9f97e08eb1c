"""How much of everything a model is made of, written down before any work, and by whom.

`plan.json` lies in the folder where a model is made, and beside the finished one: what decides
the result, as numbers and as the digest of the recipe, and with which versions the work was done.
A folder goes on with its own plan only, and one making at a time works in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from manifests.errors import PipeError, UsageError
from manifests.lock import holder, locked, sign
from manifests.publish import discard, publishing

PLAN_NAME = "plan.json"
LOCK_NAME = "making.lock"
STAGING_NAME = "staging"
_RECIPE, _VERSIONS = "recipe", "made_with"


@dataclass(frozen=True)
class Making:
    """What decides the result: the seed, the VAE's steps, the pictures that are drawn, and the
    steps of the pretraining."""

    seed: int = 0
    vae_steps: int = 5_000
    pictures: int = 24_000
    steps: int = 4_000

    def options(self) -> str:
        """The same as options of the command."""
        names = {field.name: "--" + field.name.replace("_", "-") for field in fields(self)}
        return " ".join(f"{names[name]} {value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Plan:
    """What a folder was begun with, the digest of its recipe, and the versions with which the work
    was done, in order."""

    making: Making
    recipe: str
    versions: tuple[str, ...] = ()

    def check_recipe(self, folder: Path, recipe: str) -> None:
        """Raise `UsageError` where this is the plan of another recipe than `recipe`."""
        if self.recipe != recipe:
            raise UsageError(
                f"{folder} was begun by the recipe {self.recipe or 'of an earlier version'}, and "
                f"the one of this version is {recipe}: pictures, sentences, tokenizer or settings "
                "of the trainings are others. Use the version that it was begun with, or name a "
                "new folder."
            )


@contextmanager
def begun(folder: Path, making: Making, recipe: str) -> Iterator[int]:
    """Within it this process alone makes a model in `folder`, by `making` and the recipe of that
    digest, which are a new folder's plan; the value is the lock's handle, for child processes that
    work in it, too.

    What starts that were killed have left unfinished is removed. On a file system without locks
    it cannot be known whether another making works there: nothing is refused then, and nothing
    removed. Raises `UsageError` where another one does, where `folder` was begun with another
    plan, or where it holds something else, which is then not touched.
    """
    _check(folder, making, recipe)
    with locked(folder / LOCK_NAME) as lock:
        if lock.held is False:
            raise UsageError(
                f"A model is being made in {folder} now: {holder(lock.handle)} holds its "
                f"{LOCK_NAME}. Wait for it or stop it, or name another folder."
            )
        sign(lock.handle)
        if not _check(folder, making, recipe):
            _write(folder, Plan(making, recipe))
        staging = folder / STAGING_NAME
        if lock.held and staging.is_dir():
            for leftover in staging.iterdir():
                discard(leftover)
        yield lock.handle


def _check(folder: Path, making: Making, recipe: str) -> bool:
    """Whether `folder` has its plan, of `making` and `recipe`; False where it is new.

    Writes nothing. Raises `UsageError` where it was begun with another plan, or holds
    something else.
    """
    if (folder / PLAN_NAME).exists():
        plan = read_plan(folder)
        if plan.making != making:
            raise UsageError(
                f"{folder} was begun with {plan.making.options()}, and is now to go on with "
                f"{making.options()}. Give the options that it was begun with, or name a new "
                "folder."
            )
        plan.check_recipe(folder, recipe)
        return True
    if folder.is_dir():
        # What a start that was killed leaves before its plan.
        foreign = sorted({path.name for path in folder.iterdir()} - {LOCK_NAME, STAGING_NAME})
        if foreign:
            raise UsageError(
                f"{folder} holds {foreign[0]} but no {PLAN_NAME}: no model was begun there, or "
                "by an earlier version. Name a new folder."
            )
    elif folder.exists():
        raise UsageError(f"{folder} is a file. Name a new folder.")
    return False


def read_plan(folder: Path) -> Plan:
    """The plan of `folder`; its recipe is empty where an earlier version wrote none.

    Raises `PipeError` where it cannot be read.
    """
    path = folder / PLAN_NAME
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        recipe, versions = entries.get(_RECIPE, ""), entries[_VERSIONS]
        numbers = [entries[field.name] for field in fields(Making)]
        texts = isinstance(versions, list) and all(isinstance(t, str) for t in (recipe, *versions))
        if not texts or not all(type(number) is int for number in numbers):
            raise TypeError("a value is of another kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipeError(
            f"{path} cannot be read: {error!r}. Restore it, or name a new folder."
        ) from error
    return Plan(Making(*numbers), recipe, tuple(versions))


def note_versions(folder: Path, versions: str) -> None:
    """Write down that the work in `folder` goes on with these `versions`."""
    plan = read_plan(folder)
    if versions not in plan.versions:
        _write(folder, replace(plan, versions=(*plan.versions, versions)))


def _write(folder: Path, plan: Plan) -> None:
    entries = {**asdict(plan.making), _RECIPE: plan.recipe, _VERSIONS: plan.versions}
    with publishing(folder / STAGING_NAME, folder / PLAN_NAME) as path:
        path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
