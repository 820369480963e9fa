"""What files say of their tensors is held to a form, field by field, before it is used."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from captum_robust._facts import (
    choice,
    listed,
    named,
    number,
    optional,
    or_none,
    parts,
    text,
    whole,
)
from captum_robust.attacks import UniversalPerturbation
from captum_robust.attr import AdversarialLocalization
from captum_robust.data.superpixels import cached_superpixels
from captum_robust.defenses import SafetyNet
from captum_robust.models import load_classifier, save_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    MaskingNetwork,
    load_masking_network,
    save_localization_network,
    save_masking_network,
)
from captum_robust.training.checkpoints import load_checkpoint, save_checkpoint, write_state
from captum_robust.transforms import Quilting

NAMES = ["ant", "bee", "cat"]
NAN = float("nan")
INF = float("inf")


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def classifier() -> Any:
    torch.manual_seed(0)
    return load_classifier("simple_convnet", None, class_names=NAMES).eval()


def images() -> torch.Tensor:
    return draw(12, 3, 16, 16)


def save_detector(path: Path) -> None:
    detector = SafetyNet(classifier(), ["module.block3"], bins=3)
    detector.fit(images(), 1 - images()).save(path)


def save_perturbation(path: Path) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    UniversalPerturbation(linear).fit([draw(3, 3, 2, 2)], passes=1).save(path)


def save_state(path: Path) -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(path, network, optimizer, 3)


def load_state(path: Path) -> None:
    network = nn.Linear(2, 2)
    load_checkpoint(path, network, torch.optim.Adam(network.parameters(), lr=0.1), 9)


@dataclass(frozen=True)
class Kind:
    """One kind of file: who writes it, who reads it, and what its fields cannot be."""

    key: str
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    wrong: dict[str, list[Any]]


NO_NUMBERS: list[Any] = [None, "1", [], {}, True, NAN, INF, -INF]
NO_COUNTS = [*NO_NUMBERS, 0, -5, 1.5, 10**30]
NO_NAMES: list[Any] = [7, "ab", {}, ["ant", "bee", 3], ["ant", "bee", None], ["ant"] * 100_000]
NO_MEANS: list[Any] = [7, "0.5", [], {}, [0.5] * 2, [0.5] * 4, ["a"] * 3, [NAN] * 3, [[0.5]] * 3]
NO_SIZES: list[Any] = [7.5, "a", [], {}, [0, 64], [64, -5], [30000, 64], [64.0, 64], [True, True]]
KINDS = {
    "classifier": Kind(
        "captum_robust.classifier",
        lambda path: save_classifier(classifier(), path),
        lambda path: load_classifier("simple_convnet", path),
        {
            "name": [7, [], "resnet18"],
            "class_names": [*NO_NAMES, [], ["ant"]],
            "input_size": [*NO_SIZES, 64, [64] * 3],
            "mean": NO_MEANS,
            "std": [*NO_MEANS, [0.0] * 3, [-1.0] * 3],
        },
    ),
    "masking network": Kind(
        "captum_robust.masking_network",
        lambda path: save_masking_network(MaskingNetwork(classifier()), path),
        lambda path: load_masking_network(path, classifier()),
        {
            "encoder": [None, 7, []],
            "encoder_weights": [7, "a", [NAN], ["a"], [0.1] * 1000],
            "channels": [None, 7, [], [0, 1], [1.5], [10**30] * 3, [10**7] * 3],
            "num_classes": [*NO_COUNTS, 10**7],
            "head": [None, 1, "yes"],
            "widths": [None, 7, [-1] * 3, [10**7] * 3],
            "filtered": [*NO_COUNTS, 10**7],
        },
    ),
    "localization network": Kind(
        "captum_robust.localization_network",
        lambda path: save_localization_network(
            LocalizationNetwork(CorruptionNetwork(width=4), classifier()), path
        ),
        AdversarialLocalization.from_file,
        {
            "width": [*NO_COUNTS, 10**7],
            "trunk": [7, []],
            "trunk_layers": [7, "ab", [7]],
            "trunk_class_names": NO_NAMES,
            "trunk_size": [0, -5, 30000, 1.5, "a"],
            "classifier": [None, 7, "vit_h_14"],
            "class_names": NO_NAMES,
            "input_size": NO_SIZES,
            "fill": [*NO_MEANS, None],
            "n_segments": [0, -5, 1.5, "a"],
        },
    ),
    "SafetyNet": Kind(
        "captum_robust.SafetyNet",
        save_detector,
        lambda path: SafetyNet.load(path, classifier()),
        {
            "bins": [1, 0, -5, 2.5, "a", 10**9, None],
            "summary": [None, 7, [], "median"],
            "penalty": [*NO_NUMBERS, 0, -1],
            "gamma": [*NO_NUMBERS[1:], 0, -1],
            "layers": [None, 7, "ab", [], [7], ["gone"]],
            "threshold": NO_NUMBERS,
            "machine": [
                *(None, [], {}, {"gamma": 1.0}),
                *({"gamma": value, "intercept": 0.0} for value in (NAN, INF, 0, -1, "1", None)),
                *({"gamma": 1.0, "intercept": value} for value in NO_NUMBERS),
            ],
        },
    ),
    "quilting": Kind(
        "captum-robust quilting 1",
        lambda path: Quilting(draw(20, 3, 5, 5)).save(path),
        Quilting.load,
        {
            "channels": [*NO_COUNTS, 10**7],
            "patch": [*NO_COUNTS, 7, 10**7],
            "overlap": [*NO_NUMBERS, -1, 3, 10**30],
            "seam": [None, "false", [], 2, 0.0],
            "neighbors": [*NO_COUNTS, 10**7],
            "seed": [1.5, "1", [], True, 2**64, NAN],
        },
    ),
    "universal perturbation": Kind(
        "captum_robust.UniversalPerturbation",
        save_perturbation,
        lambda path: UniversalPerturbation.load(path, lambda x: x),
        {
            "norm": [None, 7, [], "L1"],
            "epsilon": [*NO_NUMBERS, -1, 10**30],
            "bounds": [7, [], [0], [0, 1, 2], [1, 0], [0, NAN], [-INF, INF], ["a", "b"]],
            "rates": [None, 7, "ab", [2], [-1], [NAN], ["a"]],
            "fooling_rate": [-1, 2, NAN, "a"],
            "passes": [-1, 1.5, "a"],
            "settings": [7, [], "a"],
        },
    ),
    "super-pixels": Kind(
        "captum_robust.superpixels",
        lambda path: cached_superpixels(images(), path, 20),
        lambda path: cached_superpixels(images(), path, 20),
        {
            "n_segments": NO_COUNTS,
            "compactness": [*NO_NUMBERS, 0, -1],
            "size": [None, *NO_SIZES],
            "checksum": [None, 1, -1, "a", [], 1.5, 10**30],
        },
    ),
}
CASES = [
    pytest.param(kind, field, value, id=f"{name}, {field}, {str(value)[:30]}")
    for name, kind in KINDS.items()
    for field, values in kind.wrong.items()
    for value in values
]


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kind and a good file of it."""
    path = tmp_path_factory.mktemp("made") / "good.safetensors"
    KINDS[request.param].save(path)
    return KINDS[request.param], path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """A good file of a kind, written once."""
    folder = tmp_path_factory.mktemp("good")

    def of(kind: Kind) -> Path:
        path = folder / f"{kind.key}.safetensors"
        if not path.is_file():
            kind.save(path)
        return path

    return of


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def with_facts(source: Path, target: Path, key: str, change: Callable[[Any], Any]) -> Path:
    """The same tensors with other facts."""
    tensors, metadata = read(source)
    facts = change(json.loads(metadata[key]))
    save(tensors, target, {**metadata, key: json.dumps(facts)})
    return target


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file whose checksum, where it has one, is right."""
    if metadata.pop("crc32", None) is None:
        save_file(tensors, path, metadata)
    else:
        write_state(path, tensors, metadata)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Inside, a request of two gigabytes more than there are now fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_good_file_is_read(made: tuple[Kind, Path]) -> None:
    kind, path = made
    kind.load(path)


@pytest.mark.parametrize(("kind", "field", "value"), CASES)
@pytest.mark.usefixtures("little_memory")
def test_a_field_that_cannot_be_is_named(
    good: Callable[[Kind], Path], tmp_path: Path, kind: Kind, field: str, value: Any
) -> None:
    path = with_facts(
        good(kind), tmp_path / "odd.safetensors", kind.key, lambda facts: facts | {field: value}
    )
    with pytest.raises((ValueError, FileNotFoundError), match=r"odd\.safetensors") as refusal:
        kind.load(path)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("facts", [None, [], 7, "a", [{}], True])
def test_facts_that_are_no_fields_are_refused(
    made: tuple[Kind, Path], tmp_path: Path, facts: Any
) -> None:
    kind, source = made
    path = with_facts(source, tmp_path / "odd.safetensors", kind.key, lambda _: facts)
    with pytest.raises(ValueError, match=r"odd\.safetensors holds no "):
        kind.load(path)


def test_a_field_of_a_later_version_is_not_passed_over(
    made: tuple[Kind, Path], tmp_path: Path
) -> None:
    kind, source = made
    path = with_facts(source, tmp_path / "odd.safetensors", kind.key, lambda f: f | {"\x1b": 1})
    with pytest.raises(ValueError, match=r"odd\.safetensors holds no .*a later version"):
        kind.load(path)


@pytest.mark.parametrize("value", [NAN, INF])
def test_tensors_without_numbers_are_refused(
    made: tuple[Kind, Path], tmp_path: Path, value: float
) -> None:
    kind, source = made
    tensors, metadata = read(source)
    name = next((n for n, t in tensors.items() if t.is_floating_point()), None)
    if name is None:  # super-pixels are numbers of regions
        return
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"odd\.safetensors.*{name}.*|odd.*finite"):
        kind.load(tmp_path / "odd.safetensors")


def test_integers_are_no_weights(made: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, source = made
    tensors, metadata = read(source)
    whole_numbers = {name: t.long() for name, t in tensors.items()}
    save_file(whole_numbers, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors"):
        kind.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_state_dict_of_integers_or_nan_is_named(tmp_path: Path, suffix: str) -> None:
    state = classifier().module.state_dict()
    name = next(iter(state))
    save: Any = torch.save if suffix == "pt" else save_file
    path = tmp_path / f"odd.{suffix}"
    for tensor, message in ((state[name].long(), "int64"), (state[name] * NAN, "NaN or inf")):
        save({**state, name: tensor}, path)
        with pytest.raises(ValueError, match=rf"weights: .*odd.*{name}: expected .*{message}"):
            load_classifier("simple_convnet", path, class_names=NAMES)
    save({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, path)
    load_classifier("simple_convnet", path, class_names=NAMES)  # half precision is a float


def test_a_scale_of_zero_is_no_detector(good: Callable[[Kind], Path], tmp_path: Path) -> None:
    kind = KINDS["SafetyNet"]
    tensors, metadata = read(good(kind))
    tensors["scale"][0] = 0
    save_file(tensors, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors.*scale: expected positive"):
        kind.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("optimizer", value) for value in ([], None, 7, {"a": {}}, {"0": 7})),
        *(("groups", value) for value in ({}, None, 7, [], [7], [{}])),
        *(("step", value) for value in (None, -1, 10, 1.5, "3", True)),
    ],
)
def test_a_checkpoint_that_cannot_be_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "c.safetensors"
    save_state(path)
    load_state(path)
    with_facts(path, tmp_path / "odd.safetensors", key, lambda _: value)
    with pytest.raises(ValueError, match=r"odd\.safetensors"):
        load_state(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("field", "value"), [("lr", NAN), ("lr", "a"), ("betas", [0.9]), ("params", [0]), ("a", 1)]
)
def test_a_setting_of_an_optimiser_that_cannot_be_is_named(
    tmp_path: Path, field: str, value: Any
) -> None:
    path = tmp_path / "c.safetensors"
    save_state(path)

    def change(groups: Any) -> Any:
        groups = deepcopy(groups)
        groups[0][field] = value
        return groups

    with_facts(path, tmp_path / "odd.safetensors", "groups", change)
    with pytest.raises(ValueError, match=rf"odd\.safetensors.*groups, {field}"):
        load_state(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer.0.exp_avg": torch.full((2, 2), NAN)},
        {"optimizer.0.exp_avg": torch.zeros(99)},
        {"optimizer.7.exp_avg": torch.zeros(2)},
        {"other": torch.zeros(2)},
        {"network.weight": torch.zeros(2, 2, dtype=torch.long)},
        {"network.weight": torch.full((2, 2), INF)},
    ],
)
def test_a_state_of_a_training_that_cannot_be_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "odd.safetensors"
    save_state(path)
    tensors, metadata = read(path)
    save(tensors | change, path, metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors"):
        load_state(path)


def test_what_fits_and_what_does_not() -> None:
    for fact, good_ones, bad_ones in (
        (number(0, 1), [0, 1, 0.5], [-0.1, 2, NAN, None, True, "1", [1], 10**400]),
        (number(0, open_low=True), [1e-9], [0, INF]),
        (whole(1, 3), [1, 3], [0, 4, 1.0, True, "1", None]),
        (text(), ["", "a"], [None, 1, ["a"]]),
        (choice(False, True), [False, True], [0, 1, None]),
        (listed(whole(0), 1, 2), [[0], [0, 1]], [[], [0, 1, 2], [0.5], 0, None, {0: 0}]),
        (or_none(text()), [None, "a"], [0]),
        (parts({"a": whole(0)}), [{"a": 1}], [{}, {"a": -1}, {"a": 1, "b": 1}, [], None]),
        (parts({"a": whole(0)}, others=True), [{"a": 1, "b": 1}], [{}, {"b": 1}, {"a": "1"}]),
        (parts({"a": optional(whole(0))}), [{}, {"a": 1}], [{"a": None}, {"b": 1}]),
        (named(whole(0)), [{}, {"a": 1, "b": 2}], [{"a": 1, "b": "2"}, [], None]),
    ):
        assert all(map(fact.fits, good_ones))
        assert not any(map(fact.fits, bad_ones)), fact.expected
