"""The LoKr adapter: LyCORIS' modules, created with every choice stated, and its file.

Always in bypass mode: the Kronecker factors are applied to the activations, by
`kronecker_linear` rather than LyCORIS' own chain, which is slower and runs at strength 0 too.
LyCORIS' default rebuilds the whole weight, which costs a full weight gradient and loses small
changes in bfloat16. Target classes that match nothing are errors here; LyCORIS would only warn.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from manifests.errors import PipeError, UsageError
from manifests.parquet import tool_version
from omnigen_pipe.config import LokrConfig, LokrPresetConfig
from omnigen_pipe.model.kronecker import kronecker_linear
from omnigen_pipe.model.provenance import read_metadata
from omnigen_pipe.quiet import quiet_imports

#: What the guide's names mean in diffusers' OmniGen. LyCORIS matches class names exactly.
CLASS_ALIASES = {"FeedForward": "OmniGenFeedForward"}
#: How the name of every module of an adapter begins.
PREFIX = "lycoris"
#: In the metadata of the files that are written here.
_VERSION = "omnigen_pipe_version"
_MERGE = (
    "To draw with it, merge it into its base by `omnigen-pipe export`, and give the folder that "
    "this makes to `omnigen-pipe generate --model`."
)


@dataclass(frozen=True)
class TargetCount:
    """How much of the adapter one target class received."""

    target: str
    modules: int
    parameters: int
    full_matrices: int

    def describe(self) -> str:
        """One line for a person."""
        text = f"LoKr on {self.target}: {self.modules} modules, {self.parameters:,} parameters"
        if self.full_matrices:
            text += f" ({self.full_matrices} as full matrices: linear_alpha has no effect there)"
        return text


def attach(transformer: nn.Module, config: LokrConfig, seed: int) -> Any:
    """Adapt `transformer` in place and return LyCORIS' network, float32, on the CPU.

    Its parameters are the adapter's; the transformer's own stay frozen. Starts as the
    identity. The initial weights depend on `seed` alone.
    """
    with quiet_imports():
        from lycoris.logging import logger
        from lycoris.wrapper import LycorisNetwork

    # It reports on stdout, which belongs to our own summary; `count_targets` says the same.
    logger.setLevel(logging.ERROR)
    preset = config.apply_preset
    check_targets(transformer, config)
    classes = {_class_of(target) for target in preset.target_module}
    # Absent keys would persist from an earlier call: LyCORIS keeps presets as class state.
    # Its map's keys also count as targets, so only those of actual targets are handed on.
    LycorisNetwork.apply_preset(
        {
            "enable_conv": False,
            "target_module": sorted(classes),
            "target_name": [],
            "module_algo_map": {
                _class_of(target): _module_options(options)
                for target, options in preset.module_algo_map.items()
                if _class_of(target) in classes
            },
            "name_algo_map": {},
            "lora_prefix": PREFIX,
            "use_fnmatch": False,
            # Each by its own whole name: LyCORIS matches beginnings, so that `layers.1` would leave
            # out `layers.10`, too.
            "exclude_name": [
                f"{re.escape(name)}$"
                for name in _targeted(transformer, preset)
                if _is_excluded(name, preset.exclude_name)
            ],
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LycorisNetwork(
            transformer,
            multiplier=config.multiplier,
            lora_dim=config.linear_dim,
            alpha=config.linear_alpha,
            network_module=config.algo,
            factor=config.factor,
            decompose_both=config.decompose_both,
            full_matrix=config.full_matrix,
            bypass_mode=True,
        )
    network.apply_to()
    for lora in network.loras:
        lora.bypass_forward = MethodType(_adapted_forward, lora)
    network.float().requires_grad_(True)
    return network


def _adapted_forward(lora: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
    """Takes the place of a LyCORIS module's bypass: the adapted layer's output for `x`."""
    base: torch.Tensor = lora.org_forward(x)
    if strength == 0:
        return base
    w1 = lora.lokr_w1 if lora.use_w1 else lora.lokr_w1_a @ lora.lokr_w1_b
    w1 = (w1 * (lora.scale * strength)).to(x.dtype)
    if lora.use_w2:
        return base + kronecker_linear(x, w1, lora.lokr_w2.to(x.dtype))
    factors = (lora.lokr_w2_a.to(x.dtype), lora.lokr_w2_b.to(x.dtype))
    return base + kronecker_linear(x, w1, factors)


def check_targets(transformer: nn.Module, config: LokrConfig) -> None:
    """Raise `UsageError` for a target, a key of the algo map, or a pattern of `exclude_name` that
    matches nothing, and for patterns that leave nothing of a target."""
    preset = config.apply_preset
    for key, names in (
        ("target_module", preset.target_module),
        ("module_algo_map", tuple(preset.module_algo_map)),
    ):
        for name in names:
            if not _linears(transformer, _class_of(name)):
                raise UsageError(
                    f"LoKr target `{name}` matches nothing in {type(transformer).__name__} "
                    f"({key}). Classes with linear layers: {', '.join(_adaptable(transformer))}."
                )
    for target in preset.target_module:
        linears = _linears(transformer, _class_of(target))
        if all(_is_excluded(name, preset.exclude_name) for name in linears):
            raise UsageError(
                f"exclude_name leaves nothing of the LoKr target `{target}`. Take it out of "
                "target_module if that is meant."
            )
    targeted = _targeted(transformer, preset)
    for pattern in preset.exclude_name:
        if not any(_is_excluded(name, [pattern]) for name in targeted):
            raise UsageError(
                f"exclude_name `{pattern}` matches none of the {len(targeted)} linear layers of "
                f"the LoKr targets, such as {targeted[0]}."
            )


def _class_of(target: str) -> str:
    """The class that a target names, whether by the guide's name or by its own."""
    return CLASS_ALIASES.get(target, target)


def _module_options(options: Any) -> dict[str, Any]:
    named = {
        "factor": options.factor,
        "dim": options.linear_dim,
        "alpha": options.linear_alpha,
    }
    return {name: value for name, value in named.items() if value is not None}


def _linears(transformer: nn.Module, class_name: str) -> list[str]:
    """Names of the linear layers inside modules of the class."""
    names = []
    for outer, module in transformer.named_modules():
        if type(module).__name__ == class_name:
            for inner, child in module.named_modules():
                if isinstance(child, nn.Linear):
                    names.append(".".join(part for part in (outer, inner) if part))
    return names


def _targeted(transformer: nn.Module, preset: LokrPresetConfig) -> list[str]:
    """Names of the linear layers inside any target."""
    classes = dict.fromkeys(_class_of(target) for target in preset.target_module)
    names = (name for class_name in classes for name in _linears(transformer, class_name))
    return list(dict.fromkeys(names))


def _is_excluded(name: str, patterns: Collection[str]) -> bool:
    """Whether one of `patterns` matches the whole of `name`, or of a module's around it."""
    parts = name.split(".")
    around = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(re.fullmatch(pattern, module) for pattern in patterns for module in around)


def _adaptable(transformer: nn.Module) -> list[str]:
    """Classes of modules inside the blocks that hold linear layers, by the guide's names."""
    guide_names = {actual: name for name, actual in CLASS_ALIASES.items()}
    found = {
        type(module).__name__
        for module in transformer.modules()
        if any(isinstance(child, nn.Linear) for child in module.children())
    }
    return sorted(guide_names.get(name, name) for name in found - {"ModuleList"})


def count_targets(transformer: nn.Module, network: Any, config: LokrConfig) -> list[TargetCount]:
    """Modules and parameters of the adapter per target; each module counts once.

    Where one target lies within another, its modules count with the one named first.
    """
    by_name = {lora.lora_name: lora for lora in network.loras}
    counts = []
    for target in config.apply_preset.target_module:
        linears = _linears(transformer, _class_of(target))
        names = [f"{PREFIX}_{name}".replace(".", "_") for name in linears]
        loras = [by_name.pop(name) for name in names if name in by_name]
        counts.append(
            TargetCount(
                target,
                len(loras),
                sum(p.numel() for lora in loras for p in lora.parameters()),
                sum(1 for lora in loras if lora.use_w1 and lora.use_w2),
            )
        )
    return counts


def weights(network: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors as LyCORIS names them, float32 copies on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.float32).contiguous().clone()
        for name, tensor in network.state_dict().items()
    }


def save_adapter(
    tensors: Mapping[str, torch.Tensor], path: Path, config: LokrConfig, **metadata: str
) -> None:
    """Write the adapter's file; see `adapter_file`."""
    path.write_bytes(adapter_file(tensors, config, **metadata))


def adapter_file(tensors: Mapping[str, torch.Tensor], config: LokrConfig, **metadata: str) -> bytes:
    """The adapter as a safetensors file, with its configuration as metadata.

    LyCORIS' own `create_lycoris_from_weights` loads it.
    """
    entries = {
        "format": "pt",
        "lycoris_config": config.model_dump_json(),
        _VERSION: tool_version(),
        **metadata,
    }
    return _sorted(save(dict(tensors), metadata=entries))


def _sorted(file: bytes) -> bytes:
    """The same safetensors file with its header in the order of the alphabet, which the library
    leaves to chance: equal adapters are equal files.

    The format is 8 bytes of the header's length, little-endian, the header as JSON, filled up with
    spaces, and the tensors.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    text = header.encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """An adapter file's tensors and metadata; raises `PipeError` where it is not one, or
    a number of it is not finite, and `UsageError` where there is no such file."""
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata() or {}
    except FileNotFoundError as error:
        raise UsageError(f"There is no adapter {path}.") from error
    except (SafetensorError, OSError) as error:
        raise PipeError(f"{path} is not a whole safetensors file: {error}") from error
    _check_finite(path, tensors)
    return tensors, metadata


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `PipeError` where a number that counts is none; full matrices' alpha does not."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        full = all(f"{module}.{factor}" in tensors for factor in ("lokr_w1", "lokr_w2"))
        if not (part == "alpha" and full) and not torch.isfinite(tensor).all():
            raise PipeError(
                f"The adapter {path} is damaged: {name} holds numbers that are not finite. Take "
                "an earlier checkpoint."
            )


def attach_file(transformer: nn.Module, path: Path, strength: float = 1.0) -> Any:
    """Adapt `transformer` in place with the adapter file `path`, for use and not for training.

    It computes at `strength` times the strength that it was trained at. Returns LyCORIS' network,
    float32, on the CPU. A file of another program that carries such a configuration, as
    SimpleTuner's do, has only those of its targets that there are modules of. Raises `PipeError`
    where it has no such configuration, and `UsageError` where it is not what this asks for of this
    transformer.
    """
    tensors, metadata = read_adapter(path)
    config = _config(path, metadata)
    ours = _VERSION in metadata
    if not ours:
        config = _with_targets_of(transformer, config, tensors)
    network = attach(transformer, config, seed=0)
    try:
        restore_weights(network, tensors)
    except PipeError as error:
        foreign = "" if ours else f" It was not made by omnigen-pipe. {_MERGE}"
        raise UsageError(f"The adapter {path} does not fit this model: {error}{foreign}") from error
    network.set_multiplier(strength * config.multiplier)
    return network.eval().requires_grad_(False)


def _with_targets_of(
    transformer: nn.Module, config: LokrConfig, tensors: Collection[str]
) -> LokrConfig:
    """`config` without targets of which `tensors` has no module; as it is where it has of none."""
    modules = {name.partition(".")[0] for name in tensors}
    found = tuple(
        target
        for target in config.apply_preset.target_module
        if any(
            f"{PREFIX}_{name}".replace(".", "_") in modules
            for name in _linears(transformer, _class_of(target))
        )
    )
    if not found:
        return config
    preset = config.apply_preset.model_copy(update={"target_module": found})
    return config.model_copy(update={"apply_preset": preset})


def adapter_config(path: Path) -> LokrConfig:
    """The configuration that an adapter file carries; raises `PipeError` where it has none."""
    return _config(path, read_metadata(path))


def _config(path: Path, metadata: Mapping[str, str]) -> LokrConfig:
    try:
        return LokrConfig.model_validate_json(metadata["lycoris_config"])
    except (KeyError, ValueError) as error:
        raise PipeError(
            f"{path} does not say how it is to be attached: it was not made by omnigen-pipe. "
            f"{_MERGE}"
        ) from error


def restore_weights(network: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` (of `weights`) back into the network; raises `PipeError` where it has other
    modules, shapes or scales, and so would compute something else."""
    named = dict(network.named_parameters())
    for name, parameter in named.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise PipeError(
                f"The adapter's tensor {name} is missing or has another shape than the "
                "configuration asks for."
            )
    more = sorted(tensors.keys() - network.state_dict().keys())
    if more:
        raise PipeError(
            f"The adapter has {len(more)} tensors, such as {more[0]}, that the configuration does "
            "not ask for."
        )
    for lora in network.loras:
        alpha = tensors.get(f"{lora.lora_name}.alpha", lora.alpha)
        # Full matrices are not scaled, whatever alpha is.
        if not (lora.use_w1 and lora.use_w2) and float(alpha) != float(lora.alpha):
            raise PipeError(
                f"The adapter's {lora.lora_name}.alpha is {float(alpha):g}, and the configuration "
                f"makes it {float(lora.alpha):g}: set linear_alpha."
            )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
