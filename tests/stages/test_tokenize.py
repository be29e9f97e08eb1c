"""tokenize as a stage: everything wanted is tokenised once, and only what changed again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import stages.tokenize
from manifests import parquet
from manifests.errors import PipeError, UsageError
from manifests.schema import PROMPTS, SAMPLES
from manifests.views import current_prompts
from omnigen_pipe.config import parse
from omnigen_pipe.images.samples import samples_fingerprint, samples_settings
from omnigen_pipe.progress import Progress
from omnigen_pipe.prompts.template import prompt_key
from omnigen_pipe.prompts.tokenizer import load
from omnigen_pipe.settings import as_text
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

OTHERS = 3  # <cfg>, the empty prompt and the negative prompt


def workspace(root: Path, model: Path, **tables: Any) -> Workspace:
    raw = {"model": {"pretrained_model_name_or_path": str(model)}, **tables}
    return Workspace(root, parse(raw, "test"))


def publish_samples(
    opened: Workspace, captions: list[list[str]], statuses: list[str] | None = None
) -> None:
    """A samples snapshot with these captions per row; other columns are null."""
    number = len(captions)
    columns = {
        "sample_id": [f"{i:032x}" for i in range(number)],
        "captions": captions,
        "prompt_keys": [[prompt_key(text) for text in texts] for texts in captions],
        "status": statuses or ["ok"] * number,
    }
    table = pa.table(
        [
            pa.array(columns[field.name], field.type)
            if field.name in columns
            else pa.nulls(number, field.type)
            for field in SAMPLES.schema
        ],
        schema=SAMPLES.schema,
    )
    opened.samples.replace(
        table,
        settings=as_text(samples_settings(opened.config)),
        fingerprint=samples_fingerprint(opened.images.source(), opened.config),
    )


def run(opened: Workspace) -> Summary:
    return stages.tokenize.run(opened, Progress(quiet=True))


def fragments(opened: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in opened.prompts.fragments()}


def test_every_wanted_prompt_is_there_with_the_ids_of_its_text(
    tmp_path: Path, small_omnigen: Path
) -> None:
    opened = workspace(
        tmp_path,
        small_omnigen,
        validation={"validation_prompt": "a cat", "user_prompt_library": "l"},
    )
    (tmp_path / "l").write_text('{"dog": "a dog"}')
    publish_samples(
        opened, [["one", "two"], ["two"], [], ["filtered"]], ["ok", "ok", "rejected", "filtered"]
    )
    summary = run(opened)
    assert summary.counts == {
        "captions": 2,
        "other prompts": OTHERS + 2,
        "tokenised": 7,
        "already there": 0,
    }
    rows = opened.prompts.read().to_pylist()
    tokenizer = load(small_omnigen / "tokenizer")
    for row in rows:
        assert row["prompt_key"] == prompt_key(row["text"])
        assert row["input_ids"] == tokenizer.encode([row["text"]])[0]
        assert row["length"] == len(row["input_ids"])
        assert (row["tokenizer_key"], row["status"]) == (tokenizer.key, "ok")
    texts = [row["text"] for row in rows]
    assert len(texts) == len(set(texts)) == 7
    assert {"one", "two", "a cat", "a dog", "<cfg>", ""} < set(texts)


def test_a_second_run_does_nothing(tmp_path: Path, small_omnigen: Path) -> None:
    opened = workspace(tmp_path, small_omnigen)
    publish_samples(opened, [["one"], ["two"]])
    assert run(opened).changed
    before = fragments(opened)
    again = run(opened)
    assert not again.changed
    assert (again.counts["tokenised"], again.counts["already there"]) == (0, 2 + OTHERS)
    assert fragments(opened) == before


def test_a_fragment_says_what_it_was_made_from(tmp_path: Path, small_omnigen: Path) -> None:
    found = []
    for name, captions in (("a", ["one", "two"]), ("b", ["two", "one"]), ("c", ["one"])):
        opened = workspace(tmp_path / name, small_omnigen)
        publish_samples(opened, [[text] for text in captions])
        run(opened)
        (path,) = opened.prompts.fragments()
        found.append(parquet.read_metadata(path, PROMPTS)["fingerprint"])
    assert found[0] == found[1] != found[2]


def test_an_edited_caption_costs_exactly_one(tmp_path: Path, small_omnigen: Path) -> None:
    opened = workspace(tmp_path, small_omnigen)
    publish_samples(opened, [["one"], ["two"]])
    run(opened)
    publish_samples(opened, [["one"], ["two, edited"]])
    assert run(opened).counts["tokenised"] == 1
    publish_samples(opened, [["one"], ["two"]])
    assert not run(opened).changed, "going back to an earlier caption is free"


def test_another_tokenizer_tokenises_all_again(tmp_path: Path, small_omnigen: Path) -> None:
    publish_samples(workspace(tmp_path, small_omnigen), [["one"]])
    first = run(workspace(tmp_path, small_omnigen))
    other = tmp_path / "other"
    (other / "tokenizer").mkdir(parents=True)
    text = (small_omnigen / "tokenizer" / "tokenizer.json").read_text()
    (other / "tokenizer" / "tokenizer.json").write_text(text + "\n")
    second = run(workspace(tmp_path, other))
    assert second.counts["tokenised"] == first.counts["tokenised"] == 1 + OTHERS
    assert not run(workspace(tmp_path, small_omnigen)).changed, "both stay"


def test_chunks_are_fragments_and_a_killed_run_goes_on(
    tmp_path: Path, small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.tokenize, "CHUNK", 4)
    opened = workspace(tmp_path, small_omnigen)
    publish_samples(opened, [[f"caption {i}"] for i in range(7)])
    real = stages.tokenize._tokenised
    calls = 0

    def killed_at_the_third(*arguments: Any) -> pa.Table:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(stages.tokenize, "_tokenised", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(opened)
    assert len(fragments(opened)) == 2
    summary = run(opened)
    assert (summary.counts["tokenised"], summary.counts["already there"]) == (2, 8)
    assert current_prompts(opened.prompts.read()).num_rows == 7 + OTHERS


def test_long_prompts_are_named_and_not_cut(tmp_path: Path, small_omnigen: Path) -> None:
    limit = len(load(small_omnigen / "tokenizer").encode(["word " * 50])[0])
    opened = workspace(
        tmp_path,
        small_omnigen,
        prompts={"warn_tokens": limit},
        validation={"validation_negative_prompt": "short"},
    )
    publish_samples(opened, [["word " * 50], ["word " * 51], ["word " * 400]])
    for _ in range(2):  # a run with nothing to do warns as well
        summary = run(opened)
        (note,) = summary.notes
        longest = summary.details["tokens_per_prompt"]["max"]
        assert longest > 400
        assert note.startswith(f"2 prompts have more than {limit} tokens")
        assert str(longest) in note
        assert "word word" in note
    assert max(opened.prompts.read()["length"].to_pylist()) == longest


def test_a_page_of_text_is_too_long_by_default_and_0_is_never(
    tmp_path: Path, small_omnigen: Path
) -> None:
    publish_samples(workspace(tmp_path, small_omnigen), [["word " * 2000]])
    (note,) = run(workspace(tmp_path, small_omnigen)).notes
    assert "1 prompt has more than 512 tokens" in note
    assert run(workspace(tmp_path, small_omnigen, prompts={"warn_tokens": 0})).notes == []


def test_stale_samples_name_the_command(tmp_path: Path, small_omnigen: Path) -> None:
    with pytest.raises(PipeError, match="omnigen-pipe bucket"):
        run(workspace(tmp_path, small_omnigen))
    images = tmp_path / "images"
    images.mkdir()
    dataset = {"id": "d", "instance_data_dir": str(images)}
    publish_samples(workspace(tmp_path, small_omnigen, dataset=[dataset]), [["one"]])
    changed = workspace(tmp_path, small_omnigen, dataset=[{**dataset, "resolution": 512}])
    with pytest.raises(PipeError, match="omnigen-pipe bucket"):
        run(changed)


def test_a_model_without_tokenizer_json_is_named(tmp_path: Path, small_omnigen: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_omnigen / "tokenizer", model / "tokenizer")
    (model / "tokenizer" / "tokenizer.json").unlink()
    opened = workspace(tmp_path, model)
    publish_samples(opened, [["one"]])
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        run(opened)


def test_torch_and_transformers_are_not_loaded(tmp_path: Path, small_omnigen: Path) -> None:
    opened = workspace(tmp_path, small_omnigen)
    publish_samples(opened, [["one"]])
    (tmp_path / "omnigen-pipe.toml").write_text(
        f"[model]\npretrained_model_name_or_path = '{small_omnigen}'\n"
    )
    code = (
        "import sys; from omnigen_pipe import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as error:\n"
        "    heavy = {'torch', 'transformers', 'diffusers'} & set(sys.modules)\n"
        "    sys.exit(f'loaded {heavy}' if heavy else error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "tokenize", "-w", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 tokenised" in done.stdout
