import os
import pickle
import tarfile
import zipfile
from multiprocessing import get_context

import pytest
import torch
from torch.utils.data import DataLoader

from captum_robust.data import DataError, load_dataset
from captum_robust.data.tiny_imagenet import TinyImageNet

TENCH, GOLDFISH = "n01440764", "n01443537"
ARCHIVES = ["tiny.tar", "tiny.tar.gz", "tiny.tar.xz", "tiny.zip"]


@pytest.fixture
def folder(tmp_path, draw, write):
    root = tmp_path / "tiny-imagenet-2"
    write(root / "wnids.txt", f"{GOLDFISH}\n{TENCH}\n")
    for index in range(3):
        draw(root / "val" / "images" / f"val_{index}.JPEG", (64, 64 - index))
    write(
        root / "val" / "val_annotations.txt",
        f"val_0.JPEG\t{GOLDFISH}\t0\t10\t63\t20\n"
        f"val_1.JPEG\t{TENCH}\t5\t5\t5\t5\n"
        f"val_2.JPEG\t{TENCH}\t1\t2\t3\t4\n",
    )
    for wnid in (GOLDFISH, TENCH):
        for index in range(2):
            draw(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", (64, 64))
        write(root / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t9\t19\n")
    return root


@pytest.fixture
def pack(tmp_path, folder):
    def build(name):
        path = tmp_path / name
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(folder.rglob("*")):
                    archive.write(file, file.relative_to(folder.parent))
        else:
            with tarfile.open(path, "w:" + name.partition(".tar")[2].lstrip(".")) as archive:
                archive.add(folder, f"./{folder.name}")
        return path

    return build


def test_the_last_row_and_column_are_inside_the_box(folder):
    first, second, _ = TinyImageNet(folder)
    assert first.boxes.tolist() == [[0, 10, 64, 21]]
    assert second.boxes.tolist() == [[5, 5, 6, 6]]  # one pixel


def test_labels_count_imagenets_classes_or_the_lines_of_wnids(folder):
    assert [sample.label for sample in TinyImageNet(folder)] == [1, 0, 0]
    dataset = TinyImageNet(folder, labels="wnids")
    assert [sample.label for sample in dataset] == [0, 1, 1]
    assert list(dataset.class_names) == ["goldfish", "tench"]


def test_training_images_without_a_box_keep_their_folders_class(folder):
    dataset = TinyImageNet(folder, "train")
    found = {sample.id: (sample.label, sample.boxes.tolist()) for sample in dataset}
    assert found == {
        f"{TENCH}_0": (0, [[0, 0, 10, 20]]),
        f"{TENCH}_1": (0, []),
        f"{GOLDFISH}_0": (1, [[0, 0, 10, 20]]),
        f"{GOLDFISH}_1": (1, []),
    }


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_gives_what_its_folder_gives_and_unpacks_nothing(folder, pack, name, split):
    path = pack(name)
    before = set(path.parent.rglob("*"))
    packed, unpacked = TinyImageNet(path, split), TinyImageNet(folder, split)
    assert packed.ids == unpacked.ids
    for ours, theirs in zip(packed, unpacked, strict=True):
        assert (ours.id, ours.label) == (theirs.id, theirs.label)
        assert ours.image.equal(theirs.image)
        assert ours.boxes.equal(theirs.boxes)
    assert set(path.parent.rglob("*")) == before


def zip_with_links(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            name = f"{folder.name}/{file.relative_to(folder).as_posix()}"
            if file.is_symlink():  # as Info-ZIP stores it with -y
                link = zipfile.ZipInfo(name)
                link.create_system, link.external_attr = 3, 0o120777 << 16
                archive.writestr(link, os.readlink(file))
            elif file.is_file():
                archive.write(file, name)


@pytest.mark.parametrize("name", ARCHIVES)
def test_links_in_an_archive_are_the_files_that_they_lead_to(tmp_path, folder, pack, name):
    images, train = folder / "val/images", folder / "train"
    (images / "val_1.JPEG").rename(folder / "elsewhere.JPEG")
    (images / "val_1.JPEG").symlink_to("val_3.JPEG")
    (images / "val_3.JPEG").symlink_to("../../elsewhere.JPEG")
    os.link(images / "val_0.JPEG", images / "val_4.JPEG")
    (train / TENCH / "images").rename(folder / "tench")
    (train / TENCH / "images").symlink_to("../../tench")
    (folder / "tench" / f"{TENCH}_2.JPEG").symlink_to(f"{TENCH}_0.JPEG")
    (images / "val_5.JPEG").symlink_to(f"../../train/{TENCH}/images/{TENCH}_2.JPEG")
    (train / GOLDFISH / "again").symlink_to("../..")
    (images / "loop.JPEG").symlink_to("loop.JPEG")
    (images / "gone.JPEG").symlink_to("/gone.JPEG")
    path = tmp_path / name
    zip_with_links(path, folder) if path.suffix == ".zip" else pack(name)
    for split in ("train", "val"):
        packed, unpacked = TinyImageNet(path, split), TinyImageNet(folder, split)
        assert packed.ids == unpacked.ids
        for index, id in enumerate(packed.ids):
            if id in ("loop", "gone"):
                with pytest.raises(DataError, match=rf"{name}:.*{id}\.JPEG: it is a link to '"):
                    packed[index]
            else:
                assert packed[index].image.equal(unpacked[index].image)
                assert packed[index].label == unpacked[index].label


@pytest.mark.parametrize("name", [None, *ARCHIVES])
def test_what_systems_leave_beside_images_is_none(folder, pack, draw, name):
    ids = TinyImageNet(folder).ids
    for place in (
        "@eaDir/val_0.JPEG/thumb.jpg",
        "._val_1.JPEG",
        "__MACOSX/val_2.JPEG",
        "Thumbs.db",
    ):
        draw(folder / "scratch.png").rename(folder / "scratch")
        (folder / "val/images" / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / "scratch").rename(folder / "val/images" / place)
    assert TinyImageNet(pack(name) if name else folder).ids == ids


def test_links_that_lead_up_again_end(folder):
    ids = {split: TinyImageNet(folder, split).ids for split in ("train", "val")}
    for i, place in enumerate(("train", "val", f"train/{TENCH}", "val/images")):
        (folder / place / f"loop{i}").symlink_to(folder)
        (folder / place / f"back{i}").symlink_to("..")
    assert {split: TinyImageNet(folder, split).ids for split in ("train", "val")} == ids


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_can_be_pickled_and_read_from_forked_workers(pack, name):
    dataset = TinyImageNet(pack(name))
    expected = list(dataset)  # the parent has read from it before the workers are forked
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        loader = DataLoader(
            copy, batch_size=1, num_workers=2, collate_fn=list, multiprocessing_context="fork"
        )
        found = [sample for batch in loader for sample in batch]
        assert [sample.id for sample in found] == dataset.ids
        assert all(a.image.equal(b.image) for a, b in zip(found, expected, strict=True))


def test_an_archive_can_be_read_from_a_spawned_process(pack):
    dataset = TinyImageNet(pack("tiny.zip"))
    with get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.map(dataset.__getitem__, [2])[0].image, dataset[2].image)


def test_a_data_error_in_a_worker_reaches_the_caller_with_its_name(folder):
    (folder / "val/images/val_1.JPEG").write_bytes(b"")
    loader = DataLoader(TinyImageNet(folder), num_workers=1, collate_fn=list)
    with pytest.raises(DataError, match=r"val_1\.JPEG: the file is empty"):
        list(loader)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"val_1.JPEG {TENCH} 1 2 3", "expected four numbers"),
        ("val_1.JPEG", "expected four numbers"),
        (f"val_1.JPEG {TENCH} 1 2 3 x", "expected four numbers"),
        (f"val_1.JPEG {TENCH} 9 2 3 4", "no area"),
        (f"val_1.JPEG {TENCH} 1 2 64 65", "outside the image"),
        ("val_1.JPEG n99999999 1 2 3 4", "none of the 1000 classes"),
    ],
)
def test_a_bad_line_is_a_data_error_naming_it(folder, write, line, reason):
    write(folder / "val/val_annotations.txt", f"val_0.JPEG {TENCH} 0 0 9 9\n\n{line}\n")
    dataset = TinyImageNet(folder)
    assert dataset[0].label == 0
    with pytest.raises(DataError, match=rf"val_annotations\.txt:3: .*{reason}"):
        dataset[1]


def test_missing_images_and_missing_annotations_concern_their_sample_only(folder, draw):
    (folder / "val/images/val_0.JPEG").unlink()
    draw(folder / "val/images/val_10.JPEG", (64, 64))
    dataset = TinyImageNet(folder)
    assert dataset.ids == ["val_0", "val_1", "val_2", "val_10"]
    with pytest.raises(DataError, match=r"val_annotations\.txt:1: annotates val_0"):
        dataset[0]
    assert (dataset[3].label, dataset[3].boxes.shape) == (None, (0, 4))
    assert TinyImageNet(folder, skip_missing=True).ids == ["val_1", "val_2", "val_10"]


def test_an_archive_that_is_damaged_is_refused_at_once(tmp_path, pack, write):
    whole = pack("tiny.tar.gz")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for path in (cut, write(tmp_path / "text.tar", "no archive"), write(tmp_path / "e.tar", "")):
        with pytest.raises(ValueError, match=rf"{path.name}: cannot be read"):
            TinyImageNet(path)


def test_an_archive_that_is_cut_off_after_opening_is_a_data_error(pack):
    path = pack("tiny.tar")
    dataset = TinyImageNet(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"tiny\.tar:tiny-imagenet-2/val/images/val_0\.JPEG"):
        dataset[0]


def test_what_is_missing_as_a_whole_is_raised_at_once(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such file; expected a folder"):
        TinyImageNet(tmp_path / "gone.tar")
    with pytest.raises(ValueError, match="split of Tiny ImageNet: expected"):
        TinyImageNet(folder, "test")
    with pytest.raises(ValueError, match="meaning of labels: expected"):
        TinyImageNet(folder, labels="wnid")
    (folder / "val/val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt"):
        TinyImageNet(folder)
    (folder / "wnids.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no wnids\.txt"):
        TinyImageNet(folder)


@pytest.mark.data
def test_the_real_archive_has_its_counts_and_first_box(real_data):
    path = real_data / "tiny-imagenet-100.tar"
    dataset = load_dataset("tiny-imagenet", path)
    assert len(dataset) == 1500
    # Read by hand in val_annotations.txt: val_100.JPEG n03026506 29 9 63 63.
    assert dataset[dataset.ids.index("val_100")].boxes.tolist() == [[29, 9, 64, 64]]
    assert len({sample.label for sample in dataset}) == 100
    train = load_dataset("tiny-imagenet", path, split="train", labels="wnids")
    assert len(train) == 25_000
    assert {train[index].label for index in range(0, 25_000, 50)} == set(range(100))


@pytest.mark.parametrize("name", [None, "tiny.tar", "tiny.tar.gz"])
def test_names_that_are_no_utf_8_are_read(folder, pack, name):
    (folder / "val/images/val_0.JPEG").rename(folder / "val/images/caf\udce9.JPEG")
    annotations = folder / "val/val_annotations.txt"
    annotations.write_bytes(annotations.read_bytes().replace(b"val_0", b"caf\xe9"))
    dataset = TinyImageNet(folder if name is None else pack(name))
    assert dataset.ids == ["val_1", "val_2", r"caf\xe9"]
    assert dataset[2].boxes.tolist() == [[0, 10, 64, 21]]


def test_a_class_listed_twice_is_refused_because_it_would_shift_the_others(folder, write):
    write(folder / "wnids.txt", f"{GOLDFISH}\n{GOLDFISH}\n{TENCH}\n")
    with pytest.raises(ValueError, match=rf"wnids\.txt: names '{GOLDFISH}' more than once"):
        TinyImageNet(folder, labels="wnids")
    assert TinyImageNet(folder)[0].label == 1


def test_an_image_that_a_list_names_twice_is_refused_unless_both_lines_say_the_same(folder):
    lists = {"val": "val/val_annotations.txt", "train": f"train/{TENCH}/{TENCH}_boxes.txt"}
    for split, name in lists.items():
        lines = (folder / name).read_text().splitlines()
        last = lines[-1].split("\t")
        (folder / name).write_text("\n".join([*lines, lines[-1]]))
        TinyImageNet(folder, split)
        (folder / name).write_text("\n".join([*lines, "\t".join([*last[:-1], "30"])]))
        with pytest.raises(ValueError, match=f":{len(lines) + 1}: names '.*' again, otherwise"):
            TinyImageNet(folder, split)


@pytest.mark.parametrize("archive", ["tiny.tar.gz", "tiny.tar.xz", "tiny.zip"])
def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused(
    folder, pack, monkeypatch, archive
):
    (folder / "bomb.txt").write_bytes(bytes(2**22))
    path = pack(archive)
    assert 20 * path.stat().st_size < 2**22
    assert len(TinyImageNet(path)) == 3  # below the limit of 1 GiB
    monkeypatch.setenv("CAPTUM_ROBUST_MAX_GIGABYTES", str(2**20 / 2**30))
    most = max(2**20, 20 * path.stat().st_size)
    with pytest.raises(ValueError, match=f"expected at most {most} bytes unpacked, got"):
        TinyImageNet(path)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_file_of_an_archive_larger_than_any_image_is_not_read(folder, pack, monkeypatch, archive):
    (folder / "val" / "images" / "val_1.JPEG").write_bytes(os.urandom(2**20))
    dataset = TinyImageNet(pack(archive))
    monkeypatch.setenv("CAPTUM_ROBUST_MAX_GIGABYTES", str(2**19 / 2**30))
    with pytest.raises(DataError, match=r"val_1\.JPEG: expected at most 524288 bytes, got 1048576"):
        dataset[1]
    assert dataset[0].image.shape == (3, 64, 64)


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b", "\u2028ab", "a\u3000b"])
def test_a_name_may_hold_what_some_take_for_a_space(folder, draw, write, name):
    draw(folder / f"val/images/{name}.JPEG", (64, 64))
    write(folder / "val/val_annotations.txt", f"{name}.JPEG\t{TENCH}\t1\t2\t3\t4\n")
    dataset = TinyImageNet(folder)
    assert dataset[dataset.ids.index(name)].boxes.tolist() == [[1, 2, 4, 5]]


def test_what_is_no_archive_is_refused_in_one_line(tmp_path):
    (tmp_path / "a\x1b.tar").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"a\\x1b\.tar: cannot be read as a folder") as caught:
        TinyImageNet(tmp_path / "a\x1b.tar")
    assert str(caught.value).isprintable()
