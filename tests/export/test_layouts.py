"""The layouts: every name has one place, and a name without a place is said."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from manifests.errors import UsageError
from omnigen_pipe.export.layouts import Layout, beyond_authors, phi3_config, targets


def _true_model() -> tuple[list[str], dict[str, object]]:
    """Names and configuration of OmniGen-v1's transformer as diffusers builds it."""
    from diffusers import OmniGenTransformer2DModel

    rope = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    with torch.device("meta"):
        transformer = OmniGenTransformer2DModel(rope_scaling=rope)
    return list(transformer.state_dict()), dict(transformer.config)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_every_tensor_of_the_true_model_has_one_place(layout: Layout) -> None:
    names, _ = _true_model()
    found = targets(layout, names)
    assert sorted(part for target in found for part in target.parts) == sorted(names)
    assert len({target.name for target in found}) == len(found)
    assert targets(layout, reversed(names)) == found, "the order of names does not matter"


def test_the_authors_names_are_phi3_s_and_those_around_it() -> None:
    """The blocks' names against transformers' own model; the others as in OmniGen/model.py."""
    from transformers import Phi3Model

    names, config = _true_model()
    found = {target.name for target in targets("omnigen", names)}
    from transformers import Phi3Config

    with torch.device("meta"):
        phi3 = Phi3Model(Phi3Config(**phi3_config(config, None)))
    inner = {f"llm.{name}" for name in phi3.state_dict()}
    around = ["x_embedder.proj", "input_x_embedder.proj", "final_layer.linear"]
    around += [f"{time}.mlp.{i}" for time in ("time_token", "t_embedder") for i in (0, 2)]
    around += ["final_layer.adaLN_modulation.1"]
    assert found == inner | {"pos_embed"} | {
        f"{name}.{end}" for name in around for end in ("weight", "bias")
    }
    assert beyond_authors(config) == []


@pytest.mark.parametrize("name", ["layers.0.self_attn.to_q.bias", "rope.inv_freq", "extra.weight"])
def test_a_tensor_without_a_place_is_an_error(name: str) -> None:
    names, _ = _true_model()
    with pytest.raises(UsageError, match=f"such as {name}"):
        targets("omnigen", [*names, name])


def test_q_without_k_and_v_is_an_error() -> None:
    names, _ = _true_model()
    with pytest.raises(UsageError, match=r"2 tensors.*layers.3.self_attn.to_q.weight"):
        targets("omnigen", [n for n in names if n != "layers.3.self_attn.to_k.weight"])


def test_a_configuration_of_something_else_is_an_error() -> None:
    with pytest.raises(UsageError, match="not that of an OmniGen"):
        phi3_config({"hidden_size": 3}, None)
