"""Commands in processes of their own that start at once, to be killed at any moment.

A server process imports what is heavy, and forks a child per command: a child starts in
hundredths of a second instead of five. The server only imports and computes nothing, so that
forking it is safe.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pipeline_project import Ended

ROOT = Path(__file__).resolve().parents[2]

#: What the server imports before its first child.
_HEAVY = [
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "blake3",
    "diffusers.models.autoencoders.autoencoder_kl",
    "duckdb",
    "omnigen_pipe.cli",
    "omnigen_pipe.images.probe",
    "omnigen_pipe.latents.encoder",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pytest",
    "stages.bucket",
    "stages.discover",
    "stages.encode_vae",
    "stages.tokenize",
    "stages.train",
    "tokenizers",
    "torch",
    "torch.distributed.fsdp",
    "diffusers.models.transformers.transformer_omnigen",
    "lycoris.wrapper",
    "omnigen_pipe.training.session",
]

#: Far longer than any command here takes (seconds).
_PATIENCE = 120.0


@dataclass
class Child:
    """A command that runs in a process of its own, with what it prints in files."""

    process: ForkServerProcess
    output: Path
    _ended: bool = field(default=False, init=False)

    def ends_within(self, seconds: float) -> bool:
        """Whether it ended of itself, after waiting at most `seconds` for it."""
        return bool(connection.wait([self.process.sentinel], seconds))

    def kill(self) -> None:
        """Send SIGKILL; nothing where it has ended."""
        self.process.kill()

    def ended(self, status: int | None = 0) -> Ended:
        """Wait for its end, which must be with `status` (any, if None); -9 is a SIGKILL."""
        self.process.join(_PATIENCE)
        code = self.process.exitcode
        stdout, stderr = (self.output.with_suffix(s).read_text() for s in (".out", ".err"))
        assert code is not None, f"it does not end\n{stderr}"
        assert status is None or code == status, f"{code}\n{stdout}\n{stderr}"
        assert "Traceback" not in stderr, stderr
        return Ended(code, stdout, stderr)

    def json(self, status: int = 0) -> Any:
        """The same for a command that was given `--json`, parsed."""
        return json.loads(self.ended(status).stdout)


_started = 0


def start(
    root: Path,
    *arguments: str,
    first: Callable[[], object] | None = None,
    program: str = "omnigen_pipe.cli",
) -> Child:
    """Start `omnigen-pipe ARGUMENTS` in the folder `root`, or the `main` of another `program`.

    `first` is called in the child before the command: it must be a function that can be pickled,
    such as a `functools.partial` of one of this module's.
    """
    global _started
    _started += 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT) + (os.pathsep + path if path else "")  # for the server
    output = root.parent / f"{root.name}-{os.getpid()}-{_started}"
    for suffix in (".out", ".err"):
        output.with_suffix(suffix).touch()  # it may be killed before it prints
    try:
        parts = (program, str(root), arguments, str(output), first)
        process = context.Process(target=_command, args=parts)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return Child(process, output)


def note_shards(path: str) -> None:
    """Append to the file `path` how many numbers of the base model this process holds itself."""
    from torch.distributed.tensor import DTensor

    from omnigen_pipe.training import adapted

    really = adapted.shard

    def noting(transformer: Any, device: Any) -> Any:
        sharded = really(transformer, device)
        weights = list(sharded.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        held = sum(weight.to_local().numel() for weight in weights)
        with Path(path).open("a") as file:
            file.write(f"{held} {sum(weight.numel() for weight in weights)}\n")
        return sharded

    adapted.shard = noting


def start_all(
    root: Path, size: int, *arguments: str, first: Callable[[], object] | None = None
) -> list[Child]:
    """Start `size` processes of one `omnigen-pipe ARGUMENTS`, which can talk to each other.

    `first` is called in each before the command, as in `start`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = [partial(one_of, rank, size, port) for rank in range(size)]
    return [start(root, *arguments, first=both(one, first) if first else one) for one in own]


def _command(
    program: str,
    root: str,
    arguments: tuple[str, ...],
    output: str,
    first: Callable[[], object] | None,
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        handle = os.open(output + suffix, os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(root)
    sys.argv = [program, *arguments]
    if first is not None:
        first()
    importlib.import_module(program).main()


def both(*functions: Callable[[], object]) -> Callable[[], object]:
    """One `first` of several, in order."""
    return partial(_each, functions)


def _each(functions: tuple[Callable[[], object], ...]) -> None:
    for function in functions:
        function()


def kill_at(moment: int, flushes: bool = True) -> None:
    """SIGKILL this process at the `moment`-th step of publishing, counted from 1.

    Steps are the calls that change what is on the disk, each with a moment before it (odd) and
    one after it (even): making a folder, opening a file to write, renaming, removing, and
    flushing where `flushes` count.
    """
    import builtins
    import io

    import pyarrow.parquet as pq

    reached = 0

    def step() -> None:
        nonlocal reached
        reached += 1
        if reached == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **options: Any) -> Any:
            step()
            result = function(*arguments, **options)
            step()
            return result

        return stepped

    def opening(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        function = stepping(really_open) if set(mode) & set("wxa+") else really_open
        return function(file, mode, *arguments, **options)

    really_open = io.open
    io.open = builtins.open = opening  # type: ignore[assignment]
    calls = [(os, "mkdir"), (os, "rename"), (os, "unlink"), (pq.ParquetWriter, "close")]
    for module, name in [*calls, (os, "fsync")] if flushes else calls:
        setattr(module, name, stepping(getattr(module, name)))


def signal_at(place: str, call: int, number: int = signal.SIGKILL) -> None:
    """Send this process the signal `number` just before the `call`-th call, counted from 1, of
    `place`: a module and a function in it, as in `os:mkdir`."""
    module_name, name = place.split(":")
    module = importlib.import_module(module_name)
    really = getattr(module, name)
    calls = 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return really(*arguments, **options)

    setattr(module, name, counting)


def one_of(rank: int, size: int, port: int) -> None:
    """Be process `rank` of `size`, as torchrun would start it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def publish_often() -> None:
    """Let discover publish what it read after every file, and tokenize after every fourth."""
    import stages.discover
    import stages.tokenize

    stages.discover.FLUSH_SECONDS = 0.0
    stages.tokenize.CHUNK = 4


def merge_always() -> None:
    """Let a log count as crowded as soon as it has two fragments."""
    import manifests.log

    manifests.log.MERGE_AT = 1


def note_encoded(path: str) -> None:
    """Append to the file `path` a line for each latent before it goes into a shard: its key and
    the keys of its batch, all in one write, so that a kill leaves whole lines."""
    from omnigen_pipe.latents import encoder
    from omnigen_pipe.latents.shards import ShardWriter

    encode_batch, add = encoder._encode_batch, ShardWriter.add
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    keys = ""

    def encode_batch_noting(batch: Any, *arguments: Any) -> None:
        nonlocal keys
        keys = " ".join(item.pixels_key for item, _ in batch)
        encode_batch(batch, *arguments)

    def add_noting(writer: ShardWriter, pixels_key: str, *arguments: Any) -> None:
        os.write(handle, f"{pixels_key} {keys}\n".encode())
        add(writer, pixels_key, *arguments)

    encoder._encode_batch = encode_batch_noting
    ShardWriter.add = add_noting  # type: ignore[method-assign, assignment]


def hold_before_batch(number: int, path: str) -> None:
    """Wait before the `number`-th batch, counted from 1, while somebody has the lock of `path`."""
    import fcntl

    from omnigen_pipe.latents import encoder

    encode_batch = encoder._encode_batch
    begun = 0

    def encode_batch_waiting(*arguments: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == number:
            with Path(path).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH)
        encode_batch(*arguments)

    encoder._encode_batch = encode_batch_waiting


def spoil(sample_id: str) -> None:
    """Let the latent of this sample be infinite whenever training reads it."""
    from omnigen_pipe.training.batches import BatchReader

    really = BatchReader.latents

    def spoiling(reader: Any, rows: Any) -> Any:
        latents = really(reader, rows)
        for latent, name in zip(latents, reader.frozen.sample_ids(rows), strict=True):
            if name == sample_id:
                latent += float("inf")
        return latents

    BatchReader.latents = spoiling  # type: ignore[method-assign]


def little_memory(numbers: int) -> None:
    """Let the model run out of memory on latents of more `numbers` than that."""
    from omnigen_pipe.training import evaluation, objective

    really = objective.predict_velocity

    def predict(transformer: Any, x_t: Any, *arguments: Any) -> Any:
        import torch

        if x_t.numel() > numbers:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return really(transformer, x_t, *arguments)

    objective.predict_velocity = evaluation.predict_velocity = predict


def limit_file_size(nbytes: int) -> None:
    """Let no file grow beyond `nbytes`: a disk that is full, for whoever may not mount one."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def without_roots_rights() -> None:
    """Give up root's right to pass over permissions, where this process has it."""
    import ctypes

    if os.geteuid() != 0:
        return
    # capset(2), version 3: effective, permitted and inheritable capabilities, in two halves.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)()
    library = ctypes.CDLL(None, use_errno=True)
    assert library.capget(header, rights) == 0, os.strerror(ctypes.get_errno())
    for half in (0, 1):
        rights[half] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert library.capset(header, rights) == 0, os.strerror(ctypes.get_errno())
