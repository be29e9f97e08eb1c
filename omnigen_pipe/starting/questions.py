"""The questions of `omnigen-pipe init`: the few settings without which nothing can be trained.

An answer comes from the command line, else from the person at the terminal, else it is what is
proposed: for a folder of images that is there, by what it holds. Everything else is left to the
commented file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from manifests.errors import UsageError
from omnigen_pipe.config import (
    DatasetConfig,
    DatasetOptions,
    ModelConfig,
    TrainConfig,
)
from omnigen_pipe.images.captions import LIST_STRATEGIES
from omnigen_pipe.starting import proposals
from omnigen_pipe.starting.answers import Answers, DatasetAnswers
from omnigen_pipe.starting.contents import Contents
from omnigen_pipe.starting.folders import DEFAULT
from omnigen_pipe.starting.proposals import Proposal


@dataclass(frozen=True)
class Question:
    """One setting: its name among the answers, what is asked, and what holds without an answer.

    `reason` says why that is proposed. `check` raises `UsageError` for a value that cannot be.
    """

    name: str
    text: str
    default: Any
    choices: tuple[str, ...] = ()
    reason: str = ""
    check: Callable[[Any], None] = lambda value: None

    def read(self, text: str) -> Any:
        """The answer that was typed, as a value of the default's type.

        Raises `UsageError` that says what is wrong with it.
        """
        value: Any = text.strip()
        if isinstance(self.default, (int, float)):
            try:
                value = type(self.default)(value)
            except ValueError as error:
                kind = "whole number" if isinstance(self.default, int) else "number"
                raise UsageError(f"{value!r} is not a {kind}") from error
        if self.choices and value not in self.choices:
            raise UsageError(f"{value} is not one of {', '.join(self.choices)}")
        self.check(value)
        return value

    def proposing(self, proposal: Proposal) -> Question:
        """The same question with what is proposed as its default."""
        return replace(self, default=proposal.value, reason=proposal.reason)


#: Asks a question at the terminal and returns the answer, of the default's type.
Ask = Callable[[Question], Any]


def _default(model: Any, name: str) -> Any:
    return model.model_fields[name].default


def _valid(model: type[BaseModel], name: str, **others: Any) -> Callable[[Any], None]:
    """Checks a value as the field `name` of `model`, beside the `others`."""

    def check(value: Any) -> None:
        try:
            model.model_validate({**others, name: value})
        except ValidationError as error:
            raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error

    return check


def _positive(value: int) -> None:
    if value < 1:
        raise UsageError(f"{value} is less than 1")


def _not_empty(value: str) -> None:
    if not value:
        raise UsageError("it is empty")


_DATASET = {"id": "images", "instance_data_dir": "images", "resolution_type": "pixel_area"}

CAPTION_STRATEGIES: tuple[str, ...] = ("filename", "textfile", "instanceprompt")
assert {*CAPTION_STRATEGIES, *LIST_STRATEGIES} == set(
    get_args(DatasetOptions.model_fields["caption_strategy"].annotation)
)

_IMAGES = Question("images", "Folder of images, or hf://datasets/OWNER/NAME", DEFAULT)
_ABSENT = Question("absent", "There is no folder {folder} yet. Take it all the same?", False)
_ANOTHER = Question("another", "Another folder? (empty: none)", "")
_REGULARISATION = Question(
    "is_regularisation_data",
    "Is it regularisation data, to keep what the model can?",
    False,
)
_RESOLUTION = Question(
    "resolution",
    "Resolution (1024 means about 1024*1024 pixels)",
    1024,
    check=_valid(DatasetConfig, "resolution", **_DATASET),
)
_CAPTION_STRATEGY = Question(
    "caption_strategy", "Where captions come from", "filename", CAPTION_STRATEGIES
)
_INSTANCE_PROMPT = Question(
    "instance_prompt",
    "The caption of every image",
    "a photo of my subject",
    check=_not_empty,
    reason="it becomes the caption of every image of the folder. Say what they show.",
)
_REPEATS = Question(
    "repeats",
    "Repeats of {folder}: extra times per epoch",
    _default(DatasetOptions, "repeats"),
    check=_valid(DatasetConfig, "repeats", **_DATASET),
)
_BATCH = Question(
    "train_batch_size",
    "Samples per step",
    _default(TrainConfig, "train_batch_size"),
    check=_positive,
)
_STEPS = Question("max_train_steps", "Optimizer steps to train", 1000, check=_positive)
#: Those of the run that follow from nothing.
_RUN = (
    Question(
        "model",
        "Model: hub id or folder",
        _default(ModelConfig, "pretrained_model_name_or_path"),
        check=_not_empty,
    ),
    Question(
        "run_name",
        "Name of the run",
        _default(TrainConfig, "tracker_run_name"),
        check=_valid(TrainConfig, "tracker_run_name"),
    ),
    Question(
        "learning_rate",
        "Learning rate",
        _default(TrainConfig, "learning_rate"),
        check=_valid(TrainConfig, "learning_rate"),
    ),
)


@dataclass(frozen=True)
class Surroundings:
    """What proposals are made from; by default nothing is known, and the defaults hold.

    `look` gives what the folder of an answer holds, or None where it cannot be looked into.
    `batch` gives a batch size, and why, for all other answers. `say` tells the person at the
    terminal, or whoever reads the output.
    """

    look: Callable[[str], Contents | None] = lambda folder: None
    batch: Callable[[Answers], Proposal] | None = None
    say: Callable[[str], None] = lambda sentence: None
    #: Raises `UsageError` for what can be no folder of images.
    check_folder: Callable[[str], None] = lambda folder: None
    #: The longest side in pixels that the model of this name takes; None where that is not known.
    longest_side: Callable[[str], int | None] = lambda model: None
    #: Whether there is such a folder, so that a slip of the pen can be noticed.
    is_there: Callable[[str], bool] = lambda folder: True


@dataclass
class _Interview:
    given: dict[str, Any]
    ask: Ask | None
    around: Surroundings
    looked: dict[str, Contents | None] = field(default_factory=dict)

    def answer(self, question: Question) -> Any:
        """The given answer, else the typed one, else what is proposed, which is then said."""
        if question.name in self.given:
            return self.given[question.name]
        if self.ask is not None:
            if question.reason:
                self.around.say(question.reason)
            return self.ask(question)
        if question.reason:
            self.around.say(f"{question.name} = {question.default}: {question.reason}")
        return question.default

    def folder(self, question: Question, taken: list[str]) -> str:
        """A folder that is not `taken`; one that is not there only by default or on purpose."""

        def check(folder: str) -> None:
            if folder in taken:
                raise UsageError(f"{folder} is a dataset already")
            if folder != question.default:
                self.around.check_folder(folder)

        question = replace(question, check=check)
        while True:
            folder = str(self.answer(question))
            if self.ask is None or folder == question.default or self.around.is_there(folder):
                return folder
            if self.ask(replace(_ABSENT, text=_ABSENT.text.format(folder=folder))):
                return folder

    def dataset(self, folder: str, first: bool) -> DatasetAnswers:
        """The answers for the dataset in `folder`, but for its repeats."""
        contents = self.around.look(folder)
        if contents is not None:
            for sentence in contents.sentences():
                self.around.say(sentence)
        known = contents is not None and contents.usable > 0
        regularisation = False
        if not first and self.ask is not None:
            regularisation = bool(self.answer(_REGULARISATION))
        resolution, strategy = _RESOLUTION, _CAPTION_STRATEGY
        if contents is not None and known:
            model = self.given.get("model")
            longest = None if model is None else self.around.longest_side(str(model))
            resolution = resolution.proposing(proposals.resolution(contents, longest))
            kinds = {table.kind: None for table in contents.tables if table.captioned}
            strategy = replace(strategy, choices=(*CAPTION_STRATEGIES, *kinds)).proposing(
                proposals.caption_strategy(contents)
            )
        answers = DatasetAnswers(
            folder,
            self.answer(resolution),
            self.answer(strategy),
            is_regularisation_data=regularisation,
            contents=contents,
        )
        if answers.caption_strategy == "instanceprompt" or "instance_prompt" in self.given:
            answers = replace(answers, instance_prompt=self.answer(_INSTANCE_PROMPT))
        return answers

    def datasets(self) -> tuple[DatasetAnswers, ...]:
        """All datasets."""
        found: list[DatasetAnswers] = []
        if "images" in self.given:
            images = self.given["images"]
            folders = [images] if isinstance(images, str) else list(images)
            if "" in folders:
                raise UsageError("A folder of images is empty: name one, or leave it out.")
            found = [self.dataset(folder, folder is folders[0]) for folder in folders]
        else:
            found.append(self.dataset(self.folder(_IMAGES, []), first=True))
            while self.ask is not None:
                folder = self.folder(_ANOTHER, [each.images for each in found])
                if not folder:
                    break
                found.append(self.dataset(folder, first=False))
        counts = [0 if each.contents is None else each.contents.images for each in found]
        repeated = []
        for each, proposal in zip(found, proposals.repeats(counts), strict=True):
            question = replace(_REPEATS, text=_REPEATS.text.format(folder=each.images))
            if each.contents is not None and each.contents.usable:
                repeated.append(replace(each, repeats=self.answer(question.proposing(proposal))))
            else:
                repeats = self.given.get("repeats", question.default)
                repeated.append(replace(each, repeats=repeats))
        return tuple(repeated)


def answered(given: dict[str, Any], ask: Ask | None, around: Surroundings | None = None) -> Answers:
    """All answers: the given ones that are not None, asked ones (or proposals) for the rest.

    `instance_prompt` is only asked for, and only has a default, where captions come from it.
    What takes long to find out is asked for last.
    """
    around = around or Surroundings()
    interview = _Interview({n: v for n, v in given.items() if v is not None}, ask, around)
    datasets = interview.datasets()
    answers = Answers(datasets, **{q.name: interview.answer(q) for q in _RUN})
    known = any(each.contents is not None and each.contents.usable for each in datasets)
    batch = _BATCH
    if around.batch is not None and _BATCH.name not in interview.given and (known or ask):
        batch = batch.proposing(around.batch(answers))
    answers = replace(answers, train_batch_size=interview.answer(batch))
    steps = replace(_STEPS, reason=_epochs(answers, _STEPS.default) if known else "")
    return replace(answers, max_train_steps=interview.answer(steps))


def _epochs(answers: Answers, steps: int) -> str:
    """How often `steps` steps come to all samples, in a sentence."""
    counted = [each for each in answers.datasets if each.contents is not None]
    samples = sum(
        each.contents.images * (each.repeats + 1) for each in counted if each.contents is not None
    )
    batch = max(answers.train_batch_size, 1)
    return (
        f"{steps:,} steps of {batch:,} are about {steps * batch / max(samples, 1):.1f} epochs of "
        f"{samples:,} samples."
    )
