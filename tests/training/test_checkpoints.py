from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from captum_robust.training.checkpoints import (
    Log,
    has_begun,
    load_checkpoint,
    save_checkpoint,
)


def tied() -> nn.Module:
    """Two layers that share their weight."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    return network


def stepped(network: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, betas=(0.8, 0.9))
    network(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_weights_and_every_number_of_the_optimiser_come_back(tmp_path: Path) -> None:
    network = tied()
    optimizer = stepped(network)
    save_checkpoint(tmp_path / "c.safetensors", network, optimizer, 7)
    other = tied()
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    assert load_checkpoint(tmp_path / "c.safetensors", other, again) == 7
    assert other[0].weight is other[1].weight
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert again.param_groups[0]["lr"] == 0.1
    assert tuple(again.param_groups[0]["betas"]) == (0.8, 0.9)
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, again.state_dict()["state"][number][name])


def test_a_state_that_is_no_tensor_comes_back_too(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    optimizer.state[network.weight] = {"calls": 3, "momentum_buffer": None}
    save_checkpoint(tmp_path / "c.safetensors", network, optimizer, 0)
    again = torch.optim.SGD(network.parameters(), lr=0.1)
    load_checkpoint(tmp_path / "c.safetensors", network, again)
    assert again.state[network.weight] == {"calls": 3, "momentum_buffer": None}


def test_files_that_are_no_checkpoint_of_this_network_are_named(tmp_path: Path) -> None:
    network = tied()
    optimizer = stepped(network)
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors: no such file"):
        load_checkpoint(path, network, optimizer)
    for metadata in ({}, {"step": "[" * 10**5}):
        save_file({"a": torch.ones(1)}, path, metadata)
        with pytest.raises(ValueError, match=r"c\.safetensors is no checkpoint"):
            load_checkpoint(path, network, optimizer)
    save_checkpoint(path, network, optimizer, 1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_checkpoint(path, network, optimizer)
    save_checkpoint(path, network, optimizer, 1)
    other = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="is of another network or optimiser"):
        load_checkpoint(path, other, torch.optim.SGD(other.parameters(), 0.1))


@pytest.mark.parametrize(
    ("key", "optimizer", "groups"),
    [
        ("optimizer.weight", "{}", "[]"),
        ("optimizer.x.momentum_buffer", "{}", "[]"),
        ("network.weight", "[]", "[]"),
        ("network.weight", '{"0": 3}', "[]"),
        ("network.weight", "{}", "3"),
        ("network.weight", "{}", '[{"lr": 1}]'),
    ],
)
def test_a_state_of_an_earlier_version_that_is_none_is_named(
    tmp_path: Path, key: str, optimizer: str, groups: str
) -> None:
    network = nn.Linear(3, 1, bias=False)
    path = tmp_path / "c.safetensors"
    metadata = {"step": "1", "optimizer": optimizer, "groups": groups}
    save_file({key: torch.ones(1, 3)}, path, metadata)
    with pytest.raises(
        ValueError, match=r"c\.safetensors (is of another network or optimiser|holds no checkpoint)"
    ):
        load_checkpoint(path, network, torch.optim.SGD(network.parameters(), 0.1))


def test_the_log_goes_on_after_the_last_row_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, -1)
    log.add({"step": i, "loss": i / 2} for i in range(5))
    with path.open("a") as file:
        file.write("[" * 10**5 + "\n" + '{"step": 5, "lo')
    again = Log(path, 2)
    again.add([{"step": 3, "loss": 9.0}])
    expected = [{"step": i, "loss": i / 2} for i in range(3)] + [{"step": 3, "loss": 9.0}]
    assert again.rows == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", -1)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(OSError, match=r"log\.jsonl: could not be written"):
        log.add([{"step": 1}])


def test_a_run_is_known_by_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert not has_begun(file, {"size": (8, 8)})
    file.write_text(json.dumps({"configuration": {"size": [8, 8], "seed": 0}}))
    assert has_begun(file, {"size": (8, 8), "seed": 0})
    with pytest.raises(ValueError, match=r"another run \(seed: 0 there, 1 here\)"):
        has_begun(file, {"size": (8, 8), "seed": 1})
    for text in ("{", "[" * 10**5):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            has_begun(file, {})
