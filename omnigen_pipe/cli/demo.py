"""`demo`: all five stages on drawn pictures, and the proof that they taught something."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from omnigen_pipe.cli.all_stages import check_machine, run_stages
from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import (
    DeviceOption,
    JsonOption,
    QuietOption,
    given_path,
    open_workspace,
)
from omnigen_pipe.cli.outcome import leave


@command("demo", epilog="Examples:  \n`omnigen-pipe demo`  \n`omnigen-pipe demo -w /tmp/demo`")
def demo(
    workspace: Annotated[
        Path,
        typer.Option(
            "--workspace", "-w", parser=given_path, help="Folder that the demo is written into."
        ),
    ] = Path("demo"),
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Teach the embedded model a new shape by all five stages, and measure it; no download."""
    from omnigen_pipe.demo.project import write_project
    from omnigen_pipe.progress import Progress

    check_machine(device)
    write_project(workspace, Progress(quiet))
    opened, progress = open_workspace(workspace, quiet)
    summaries = run_stages(opened, progress, device, shown=not as_json)
    if as_json and any(summary.failed or summary.signal is not None for summary in summaries):
        print(json.dumps({"stages": [s.as_json() for s in summaries]}, indent=2, default=str))
    leave(summaries, strict=False)
    from omnigen_pipe.demo.proof import DRAWING, GRID_NAME, prove
    from omnigen_pipe.stop import Stopped

    adapter = Path(str(summaries[-1].details["adapter"]))
    try:
        proof = prove(opened, adapter, progress, device)
    except Stopped as stop:
        said = "Stopped: the adapter is trained, and not measured. Run the same command to go on."
        progress.note(said, always=True)
        if as_json:
            stages = [summary.as_json() for summary in summaries]
            told = {"stages": stages, "proof": None, "signal": stop.signal}
            print(json.dumps(told, indent=2, default=str))
        raise typer.Exit(128 + stop.signal) from None
    grid = opened.root / GRID_NAME
    if as_json:
        stages = [summary.as_json() for summary in summaries]
        result = {"stages": stages, "proof": proof.as_json(), "grid": str(grid)}
        print(json.dumps(result, indent=2, default=str))
        return
    print("\n" + "\n".join(proof.sentences()))
    print(f"Before and after: {grid}")
    print(f"The adapter lies at {adapter}")
    # Without an activated environment the bare name would not be found.
    command = "omnigen-pipe" if shutil.which("omnigen-pipe") else sys.argv[0]
    print(
        f"Draw with it:  {command} generate -w {shlex.quote(str(workspace))} "
        f"--adapter {shlex.quote(str(adapter))} --guidance {DRAWING['guidance_scale']:g} "
        f"--steps {DRAWING['num_inference_steps']} "
        '"a large red zorp on a black background" -o zorp.png'
    )
