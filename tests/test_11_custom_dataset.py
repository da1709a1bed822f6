"""Lesson 11: pictures are read as people see them, every file is accounted for, and no split leaks by accident."""

import importlib
import io
import multiprocessing
import os
import re
import shutil
import struct
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import PATHS, assert_same_state, load, run_lesson
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

NAME = "11_custom_dataset"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs file names and limits as Linux has them")
FORK = pytest.mark.skipif(
    multiprocessing.get_all_start_methods()[0] != "fork", reason="every worker would take seconds to start"
)
SHORT = ["--epochs", 1, "--batch-size", 4, "--workers", 0]
ORIENTATION = 0x0112  # its number in the EXIF data


@pytest.fixture(scope="module")
def lesson():
    """Lesson 11 under a name by which the workers of a DataLoader can import it, however they are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATHS["01"].parent)
        yield importlib.import_module(NAME)
    del sys.modules[NAME]


def paint(folder, classes, groups=6, name="{}_1.png"):
    """Write a folder of pictures of noise, in which every class has a color of its own. Return the folder."""
    rng = np.random.default_rng(0)
    for label, class_name in enumerate(classes):
        (folder / class_name).mkdir(parents=True)
        for group in range(groups):
            pixels = rng.integers(0, 100, (40, 50, 3), dtype=np.uint8)
            pixels[..., label % 3] += 150
            Image.fromarray(pixels).save(folder / class_name / name.format(group))
    return folder


def model_path(folder):
    return folder / "artifacts" / "checkpoints" / NAME / "best_model.pth"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def accuracy_of(lesson, model, mean, std, paths, class_to_idx):
    """Return how many percent of the pictures a model assigns to the class of their folder."""
    images = torch.stack([lesson.read_picture(path) for path in paths])
    labels = torch.tensor([class_to_idx[path.parent.name] for path in paths])
    with torch.no_grad():
        correct = model.eval()((images / 255 - mean) / std).argmax(dim=1) == labels
    return 100 * correct.double().mean().item()


@pytest.fixture(scope="module")
def digits(lesson, tmp_path_factory):
    """A run of two epochs on pictures that the lesson makes of digits, and what train() was given and returned."""
    run = SimpleNamespace(folder=tmp_path_factory.mktemp("pictures"), trained={})
    train = lesson.train

    def record(args, split, *rest):
        run.trained[split] = (*rest, train(args, split, *rest))
        return run.trained[split][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson, "train", record)
        flags = ["--subset", 120, "--epochs", 2, "--batch-size", 32, "--workers", 0]
        run.output = run_lesson(lesson, run.folder, *flags)
    run.pictures = run.folder / "artifacts" / NAME / "digits_5_groups"
    return run


# A picture


def test_a_picture_is_turned_upright(lesson, tmp_path):
    """The EXIF data say how. The image is uint8 (3, 32, 32)."""
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20, :20] = [200, 100, 0]  # the upper left quarter
    for orientation, turns in [(1, 0), (3, 2), (6, 1), (8, 3)]:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(np.rot90(pixels, turns)).save(tmp_path / "turned.png", exif=exif)
        image = lesson.read_picture(tmp_path / "turned.png")
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert image[:, 8, 8].tolist() == [200, 100, 0], orientation
        assert not image[:, 24, 8].any() and not image[:, 8, 24].any() and not image[:, 24, 24].any()


def test_pictures_with_transparency_or_16_bits_look_as_in_a_viewer(lesson, tmp_path):
    """What is transparent becomes white, whatever its color is. A middle gray of 16 bits is one of 8 bits."""
    hidden = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    hidden.paste((0, 0, 90, 255), (0, 0, 40, 20))
    hidden.save(tmp_path / "hidden.png")
    image = lesson.read_picture(tmp_path / "hidden.png")
    assert image[:, 8, 16].tolist() == [0, 0, 90] and image[:, 24, 16].tolist() == [255, 255, 255]
    Image.fromarray(np.full((40, 50), 128 * 257, dtype=np.uint16)).save(tmp_path / "16_bits.png")
    Image.fromarray(np.full((40, 50), 128, dtype=np.uint8)).save(tmp_path / "gray.png")
    for name in ["16_bits.png", "gray.png"]:
        image = lesson.read_picture(tmp_path / name)
        assert image.shape == (3, 32, 32) and set(image.flatten().tolist()) == {128}, name


def test_the_middle_square_of_a_large_jpeg_is_read_at_a_fraction_of_its_size(lesson, tmp_path, monkeypatch):
    """The image is the same as if the whole picture had been decoded, up to rounding."""
    sizes, transpose, across = [], ImageOps.exif_transpose, np.linspace(0, 255, 1200, dtype=np.uint8)
    pixels = np.full((800, 1200, 3), 90, dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = across, across[:800, None]
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    monkeypatch.setattr(
        ImageOps, "exif_transpose", lambda picture: sizes.append(picture.size) or transpose(picture)
    )
    image = lesson.read_picture(tmp_path / "large.jpg").permute(1, 2, 0).int().numpy()
    assert np.abs(image - pixels[:, 200:1000].reshape(32, 25, 32, 25, 3).mean(axis=(1, 3))).max() < 6
    assert sizes == [(150, 100)]


def test_gray_values_of_an_unknown_range_are_refused(lesson, tmp_path):
    """A picture of decimal numbers, such as depths or temperatures, would become black."""
    Image.fromarray(np.full((40, 50), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises((OSError, ValueError)):
        lesson.read_picture(tmp_path / "float.tiff")


def test_every_file_is_closed_again(lesson, digits, monkeypatch):
    """So is a broken one, because only so many files may be open at a time."""
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(original(file)) or opened[-1])
    broken = 0
    for path in digits.pictures.glob("9/*"):
        try:
            lesson.read_picture(path)
        except OSError:
            broken += 1
    assert len(opened) == 20 and broken == 1
    assert all(getattr(picture, "fp", None) is None or picture.fp.closed for picture in opened)


# The Dataset


def test_the_dataset_gives_what_torchvisions_image_folder_gives(lesson, digits, tmp_path):
    """The line in its docstring is run here. An item is an image, uint8 (3, 32, 32), and the number of its class."""
    folder = tmp_path / "copy"
    shutil.copytree(digits.pictures, folder)
    (folder / "9" / "004_4.jpg").unlink()  # the broken one
    idiom = "ImageFolder(folder, loader=read_picture, transform=transform)"
    assert idiom in lesson.PictureDataset.__doc__
    transform = v2.RandomInvert(p=1.0)
    names = {"ImageFolder": ImageFolder, "folder": folder, "transform": transform}
    usual = eval(idiom, names | vars(lesson))
    paths = sorted(folder.glob("*/*"))
    own = lesson.PictureDataset(paths, [int(path.parent.name) for path in paths], transform)
    plain = lesson.PictureDataset(paths, own.labels)
    assert len(own) == len(usual) == len(plain) == 200
    assert [path for path, _ in usual.samples] == [str(path) for path in paths]
    for i in range(200):
        (image, label), (expected, usual_label) = own[i], usual[i]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert torch.equal(image, expected) and label == usual_label == int(paths[i].parent.name)
        assert torch.equal(plain[i][0], 255 - image)


def test_only_training_images_are_augmented_and_differently_each_time(lesson, digits):
    """Validation images are the pictures as they are. Digits are not flipped."""
    for train_set, val_set, *_ in digits.trained.values():
        first, second = ([image for image, _ in train_set] for _ in range(2))
        plain = [lesson.read_picture(path) for path in train_set.paths]
        for one, other in [(first, second), (first, plain)]:
            assert sum(map(torch.equal, one, other)) < len(plain) / 4
        assert all(
            torch.equal(val_set[i][0], lesson.read_picture(path)) for i, path in enumerate(val_set.paths)
        )
        flip, crop = train_set.transform.transforms
        assert flip.p == 0 and crop.size == (32, 32) and set(crop.padding) == {2}


def test_own_pictures_are_flipped_and_test_images_are_not_changed(lesson, tmp_path, monkeypatch):
    """Half of the training images are flipped."""
    folder, sets, tested = paint(tmp_path / "pets", ["cat", "dog"]), [], []

    def train(args, split, train_set, *_):
        sets.append(train_set)
        return lesson.SimpleCNN(2), 50.0

    monkeypatch.setattr(lesson, "train", train)
    monkeypatch.setattr(
        lesson, "evaluate", lambda model, loader, *_: tested.append(loader.dataset) or (1.0, 50.0)
    )
    run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT)
    flip, _ = sets[0].transform.transforms
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    assert len(tested) == 1 and not set(tested[0].paths) & set(sets[0].paths)
    for i, path in enumerate(tested[0].paths):
        assert torch.equal(tested[0][i][0], lesson.read_picture(path))


# The files


def test_every_file_is_read_once_and_what_is_left_out_is_named(lesson, tmp_path, capsys):
    """Broken files, files that are no pictures, and copies, in whichever class they are, are left out."""
    folder = paint(tmp_path / "pictures", ["cat", "cat-fish", "dog"])
    cat, dog = folder / "cat", folder / "dog"
    (cat / "deep").mkdir()
    Image.new("L", (30, 20), 50).save(cat / "deep" / "small.jfif", format="JPEG")
    shutil.copy(cat / "0_1.png", dog / "a copy.png")
    (dog / "cut.png").write_bytes((dog / "1_1.png").read_bytes()[:-300])
    (dog / "notes.txt").write_text("no picture", encoding="utf-8")
    files = [path for path in folder.rglob("*") if path.is_file()]
    opened, listening = Counter(), True

    def listen(event, details):  # Python calls it whenever a file is opened, and it cannot be removed
        if listening and event == "open" and str(details[0]).startswith(str(folder)):
            opened[str(details[0])] += 1

    sys.addaudithook(listen)
    paths, labels = lesson.check_files(folder, ["cat", "cat-fish", "dog"])
    listening = False
    assert opened == {str(path): 1 for path in files} and len(files) == 22
    head, *reasons = capsys.readouterr().out.splitlines()
    assert head == f"{folder}: 7 cat, 6 cat-fish, 6 dog"
    assert reasons[0] == f"  left out: {dog / 'a copy.png'} is a copy of another file"
    for line, name in zip(reasons[1:], ["cut.png", "notes.txt"], strict=True):
        assert re.match(rf"  left out: {re.escape(str(dog / name))}: \w+", line)
    expected = sorted(set(files) - {dog / "a copy.png", dog / "cut.png", dog / "notes.txt"})
    assert sorted(paths) == expected
    assert [["cat", "cat-fish", "dog"][label] for label in labels] == [
        p.relative_to(folder).parts[0] for p in paths
    ]


def test_at_most_ten_files_that_are_left_out_are_named(lesson, tmp_path, capsys):
    """The number of the others is printed."""
    folder = paint(tmp_path / "pictures", ["cat"], groups=1)
    for i in range(13):
        (folder / "cat" / f"{i:02}.txt").write_text("no picture", encoding="utf-8")
    lesson.check_files(folder, ["cat"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and "09.txt" in lines[10] and lines[11] == "  and 3 more"


@pytest.mark.parametrize("hidden", ["@eaDir", "#recycle", "$RECYCLE.BIN", ".hidden", "__MACOSX"])
def test_hidden_files_and_folders_are_skipped(lesson, tmp_path, capsys, hidden):
    """Such a folder is no class, and what is in it is neither read nor named."""
    folder = paint(tmp_path / "pictures", ["cat", "dog"])
    for name in [hidden, f"cat/{hidden}", f"dog/deep/{hidden}/deeper"]:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / name / "a.png")
    (folder / "cat" / f"{hidden[:2]}0_1.png").write_bytes(b"a Mac leaves such files")
    assert lesson.find_classes(folder) == ["cat", "dog"]
    paths, _ = lesson.check_files(folder, ["cat", "dog"])
    assert len(paths) == 12 and capsys.readouterr().out == f"{folder}: 6 cat, 6 dog\n"


def test_an_orientation_that_is_text_is_ignored(lesson, tmp_path):
    """Some programs write such EXIF data, and the picture is still a picture."""
    entry = struct.pack("<IHHHI4sI", 8, 1, ORIENTATION, 2, 4, b"six\0", 0)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0" + entry)
    with Image.open(tmp_path / "odd.jpg") as picture:
        assert picture.getexif()[ORIENTATION] == "six"
    assert lesson.read_picture(tmp_path / "odd.jpg")[0].min() > 250


@LINUX
def test_names_that_are_not_utf_8_do_not_stop_the_run(lesson, tmp_path, monkeypatch):
    """They come from old disks and archives. The terminal would refuse to print them."""
    folder = paint(tmp_path / "pictures", ["cat", "dog"])
    odd = [os.fsencode(folder / "cat") + b"/caf\xe9_" + end for end in [b"1.png", b"2.png", b"3.txt"]]
    shutil.copy(folder / "cat" / "0_1.png", odd[0])  # a copy, which is named
    Image.new("RGB", (40, 40), "white").save(os.fsdecode(odd[1]))
    with open(odd[2], "w") as file:
        file.write("no picture")
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        paths, labels = lesson.check_files(folder, ["cat", "dog"])
        groups = lesson.find_groups(folder, paths)
        lesson.split_pictures(labels, groups, "by_group", 0)
    assert len(paths) == 13 and os.fsdecode(odd[1]) in map(str, paths)


# The classes


@pytest.mark.parametrize(
    "names", [["train", "val", "test"], ["valid", "train"], ["Testing", "Training", "extra"]]
)
def test_folders_that_are_splits_are_refused(lesson, tmp_path, names):
    """They would be learned as classes. The sentence names them, and the folder to give instead."""
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path / "out", "--images", tmp_path, *SHORT)
    sentence, training = error.value.code, next(name for name in names if name.lower().startswith("train"))
    assert sentence.endswith(f" in {tmp_path} are splits, not classes. Give --images {tmp_path / training}")
    assert set(sentence.split(" in ")[0].split(", ")) == set(names) - {"extra"}
    assert not (tmp_path / "out").exists()


def test_a_class_may_be_called_train(lesson, tmp_path):
    """Between planes and ships, it is one. The classes are in alphabetical order."""
    for name in ["ship", "train", "plane"]:
        (tmp_path / name).mkdir()
    assert lesson.find_classes(tmp_path) == ["plane", "ship", "train"]


@pytest.mark.parametrize("content", ["no folder", "nothing", "pictures alone", "one class"])
def test_a_folder_without_classes_gets_one_sentence(lesson, tmp_path, content):
    """Nothing is written."""
    folder = tmp_path / "pictures"
    if content != "no folder":
        folder.mkdir()
    if content == "pictures alone":
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    if content == "one class":
        (folder / "cat").mkdir()
    sentence = f"{folder} must hold a folder for every class, at least two."
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT)
    assert error.value.code == (f"There is no folder {folder}." if content == "no folder" else sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pictures", [0, 4])
def test_a_class_with_too_few_pictures_gets_one_sentence_that_names_it(lesson, tmp_path, pictures):
    """Five groups are the fewest that can be split. Nothing is trained or written."""
    folder = paint(tmp_path / "pictures", ["cat", "dog"])
    for path in sorted(folder.glob("dog/*"))[pictures:]:
        path.unlink()
    with pytest.raises(SystemExit, match=r"^The class dog has fewer than 5 groups of pictures\."):
        run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT)
    assert not (tmp_path / "out").exists()


# The groups and the split


def test_a_group_is_the_name_before_the_last_number(lesson, tmp_path, capsys):
    """It ends in _1, -2 or (3). A subfolder of a class is one group."""
    groups = {"tom": ["tom_1.jpg", "tom-2.jpg", "tom (3).jpg", "tom(4).png"], "tom-cat": ["tom-cat_12.jpg"]}
    groups |= {"a.b": ["a.b_1.jpg"], "13": ["13.jpg"], "rex": ["rex.jpg"]}
    groups |= {"beach": ["beach/x.jpg", "beach/y_1.jpg"], "beach/hut": ["beach/hut/x.jpg"]}
    names = [
        (f"{c}/{group}", f"{c}/{name}") for c in ["x_1", "y"] for group in groups for name in groups[group]
    ]
    found = lesson.find_groups(tmp_path, [tmp_path / name for _, name in names])
    assert [group.replace(os.sep, "/") for group in found] == [group for group, _ in names]
    assert capsys.readouterr().out == "14 groups, 4 of them with more than one picture\n"


def test_running_numbers_are_no_groups(lesson, tmp_path, capsys):
    """The names of a camera say nothing about siblings, so every picture is its own group. That is said."""
    paths = [tmp_path / name / f"IMG_{i:04}.jpg" for name in ["cat", "dog"] for i in range(30)]
    assert len(set(lesson.find_groups(tmp_path, paths))) == 60
    first, second = capsys.readouterr().out.splitlines()
    assert "every picture is its own group" in first
    assert second == "60 groups, 0 of them with more than one picture"


@pytest.mark.parametrize("split", ["by_file", "by_group"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_split_keeps_groups_together_where_it_promises_to(lesson, split, seed):
    """The test set has groups of its own. by_file has siblings of training pictures in the validation set."""
    sizes = {f"{name}/{i}": 1 + i % 4 for name in ["cat", "dog"] for i in range(80)}
    groups = np.array([group for group, size in sizes.items() for _ in range(size)])
    labels = np.array([int(group.startswith("dog")) for group in groups])
    parts = lesson.split_pictures(labels, groups, split, seed)
    assert sorted(np.concatenate(parts)) == list(range(400))
    for part, share in zip(parts, [0.6, 0.2, 0.2], strict=True):
        assert len(part) == pytest.approx(400 * share, abs=8)
        assert labels[part].mean() == pytest.approx(0.5, abs=0.03), "as many cats as dogs"
    train, val, test = (set(groups[part]) for part in parts)
    assert not test & (train | val)
    if split == "by_group":
        assert not train & val
    else:
        assert len(train & val) > len(val) / 2, "the leak that this split is to show"
    again, other = (lesson.split_pictures(labels, groups, split, s) for s in [seed, seed + 1])
    assert all(map(np.array_equal, again, parts)) and not np.array_equal(np.sort(other[2]), np.sort(parts[2]))
    both = [lesson.split_pictures(labels, groups, s, seed)[2] for s in ["by_file", "by_group"]]
    assert np.array_equal(*both), "both splits have the same test set"


# The pictures that the lesson makes


def test_the_made_folder_has_every_kind_of_picture(lesson, digits):
    """Four shots of each of five digits per class, some turned, some gray, one file broken, and one a copy."""
    files = [path for path in digits.pictures.rglob("*") if path.is_file()]
    assert len(files) == 201 and list(digits.pictures.parent.iterdir()) == [digits.pictures]
    kinds = Counter()
    for path in files:
        with Image.open(path) as picture:
            kinds[picture.mode, picture.getexif().get(ORIENTATION, 1)] += 1
    assert set(kinds) == {("RGB", 1), ("RGB", 3), ("RGB", 6), ("RGB", 8), ("L", 1)}
    assert "50 groups, 50 of them with more than one picture\n" in digits.output
    reasons = re.findall(r"left out: (.*)", digits.output)
    assert (
        len(reasons) == 2 and reasons[0] == f"{digits.pictures / '0' / 'copy.jpg'} is a copy of another file"
    )
    assert str(digits.pictures / "9" / "004_4.jpg") in reasons[1] and "truncated" in reasons[1]
    assert "Device: cpu | digits: 199 pictures\n" in digits.output


def test_shots_of_one_digit_look_alike_once_they_are_upright(lesson, digits):
    """A shot resembles the others of its group more than it would upside down."""
    images = {}
    for path in digits.pictures.glob("[1-8]/*"):
        pixels = lesson.read_picture(path)[:, 4:28, 4:28].float().mean(dim=0)
        images.setdefault((path.parent.name, path.stem[:3]), []).append(
            (pixels - pixels.mean()) / pixels.std()
        )
    pairs = [
        (one, other) for shots in images.values() for one in shots for other in shots if one is not other
    ]
    alike, turned = (torch.stack([(one * f(other)).mean() for one, other in pairs]).mean()
                     for f in [lambda x: x, lambda x: x.rot90(2)])  # fmt: skip
    assert len(pairs) == 480 and alike > turned + 0.2


def make_few_pictures(lesson, output_dir):
    args = ["--data", "digits", "--subset", "1", "--device", "cpu", "--output-dir", str(output_dir)]
    return lesson.make_pictures(lesson.parse_args(args))


def test_pictures_are_made_once_and_never_by_half(lesson, tmp_path, monkeypatch):
    """An interrupted start leaves nothing that the next one would use. A finished folder is used as it is."""
    save, saved, folder = Image.Image.save, [], tmp_path / "artifacts" / NAME / "digits_5_groups"

    def stop(picture, *rest, **options):
        if len(saved) == 20:
            raise KeyboardInterrupt
        saved.append(save(picture, *rest, **options))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", stop)
        make_few_pictures(lesson, tmp_path)
    assert not folder.exists()
    assert make_few_pictures(lesson, tmp_path) == (folder, "digits") and len(contents(folder)) == 201
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_few_pictures(lesson, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_two_starts_at_the_same_moment_do_no_harm_to_each_other(lesson, tmp_path, monkeypatch):
    """The second finishes its pictures while the first still makes some. Both use the same complete folder."""
    replace, results = os.replace, []

    def let_the_other_be_faster(source, target):
        monkeypatch.setattr(os, "replace", replace)
        results.append(make_few_pictures(lesson, tmp_path))
        results.append(contents(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", let_the_other_be_faster)
    folder, data = make_few_pictures(lesson, tmp_path)
    assert results == [(folder, data), contents(folder)] and len(results[1]) == 201
    assert list(folder.parent.iterdir()) == [folder]


# A run


def test_mean_and_deviation_are_those_of_the_training_pictures(lesson, digits):
    """They are computed again by NumPy, from the pictures without augmentation."""
    train_set, _, _, mean, std, _ = digits.trained["by_group"]
    pixels = np.stack([lesson.read_picture(path).numpy() for path in train_set.paths]) / 255
    assert mean.shape == std.shape == (3, 1, 1) and mean.dtype == std.dtype == torch.float32
    assert mean.flatten().numpy() == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-6)
    assert std.flatten().numpy() == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-6)
    images = torch.tensor(np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32)), dtype=torch.uint8)
    mean, _ = lesson.measure_pixels(
        [(images[:5] // 3, None), (images[5:], None)]
    )  # batches that are not equal
    expected = torch.cat([images[:5] // 3, images[5:]]).double().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(mean.flatten().double(), expected, atol=1e-6)


def test_printed_accuracies_are_those_of_the_best_models(lesson, digits):
    """They are computed again from the files of the split. The validation accuracy is the highest of its curve."""
    paths = [p for p in sorted(digits.pictures.glob("*/0*")) if p.parent.name + p.name != "9004_4.jpg"]
    labels = np.array([int(path.parent.name) for path in paths])
    groups = np.array([f"{path.parent.name}/{path.name[:3]}" for path in paths])
    rows = re.findall(r"^  (by_\w+) +([\d.]+) % +([\d.]+) %$", digits.output, flags=re.MULTILINE)
    assert [split for split, *_ in rows] == ["by_file", "by_group"]
    class_to_idx = {str(i): i for i in range(10)}
    for split, *printed in rows:
        *_, mean, std, (model, _) = digits.trained[split]
        _, val, test = lesson.split_pictures(labels, groups, split, 42)
        for part, accuracy in zip([val, test], printed, strict=True):
            expected = accuracy_of(lesson, model, mean, std, [paths[i] for i in part], class_to_idx)
            assert float(accuracy) == pytest.approx(expected, abs=0.006)
        [run] = (digits.folder / "tensor_board" / NAME / split).iterdir()
        curve = read_scalars(run)["Accuracy/val"]
        assert [step for step, _ in curve] == [1, 2]
        assert float(printed[0]) == pytest.approx(max(value for _, value in curve), abs=0.006)


def test_the_checkpoint_says_which_output_is_which_class(lesson, digits):
    """It holds the best model of by_group, and with it all that is needed to use the model."""
    checkpoint = load(model_path(digits.folder))
    *_, mean, std, (model, _) = digits.trained["by_group"]
    assert_same_state(dict(checkpoint.pop("model")), dict(model.state_dict()))
    class_to_idx = {str(i): i for i in range(10)}
    assert_same_state(checkpoint, {"class_to_idx": class_to_idx, "mean": mean, "std": std, "data": "digits"})
    assert [path.name for path in model_path(digits.folder).parent.iterdir()] == ["best_model.pth"]
    assert f"Model, trained on the split by_group: {model_path(digits.folder)}\n" in digits.output


def test_the_best_epoch_is_tested_once_and_kept(lesson, tmp_path, monkeypatch):
    """Of two equal epochs it is the first. Own pictures are split by group only."""
    seen, accuracies = [], iter([20.0, 60.0, 60.0, 40.0, 55.0])

    def evaluate(model, *_):
        seen.append({name: weights.clone() for name, weights in model.state_dict().items()})
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    folder = paint(tmp_path / "my pets", ["cat", "dog"])
    output = run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT, "--epochs", 4)
    best = load(model_path(tmp_path / "out"))
    assert len(seen) == 5 and best["data"] == "my pets" and best["class_to_idx"] == {"cat": 0, "dog": 1}
    assert_same_state(seen[4], seen[1])
    assert_same_state(dict(best["model"]), seen[1])
    assert re.search(r"^  by_group +60\.00 % +55\.00 %$", output, flags=re.MULTILINE)
    assert "by_file" not in output and "Device: cpu | my pets: 12 pictures\n" in output


def test_the_sheet_shows_the_pictures_as_the_model_sees_them(lesson, digits):
    """The first four of every class are in custom_dataset.png, three times as large."""
    path = digits.folder / "artifacts" / "custom_dataset.png"
    assert f"as the model sees them: {path}\n" in digits.output
    sheet = np.asarray(Image.open(path))
    for label in range(10):
        for i in range(4):
            top, left = 2 + 98 * label, 2 + 98 * i
            tile = sheet[top + 1 : top + 96 : 3, left + 1 : left + 96 : 3]
            image = lesson.read_picture(digits.pictures / str(label) / f"000_{i + 1}.jpg")
            assert (tile == image.permute(1, 2, 0).numpy()).all()


# Workers


def test_workers_that_import_the_lesson_anew_read_the_same_images(lesson, digits):
    """So it is on Windows and macOS, where the data set travels to the workers as a pickle."""
    paths = sorted(digits.pictures.glob("*/000_1.jpg"))[:4]
    pictures = lesson.PictureDataset(paths, np.arange(4))
    [(images, labels)] = DataLoader(pictures, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(images, torch.stack([lesson.read_picture(path) for path in paths]))


@FORK
def test_a_run_with_workers_equals_one_without(lesson, tmp_path, monkeypatch):
    """The weights are the same bit for bit. Augmentation is off, because every worker draws its own numbers."""
    folder = paint(tmp_path / "pets", ["cat", "dog"])
    monkeypatch.setattr(v2, "Compose", lambda _: None)
    for workers in [0, 2]:
        flags = ["--images", folder, *SHORT, "--workers", workers]
        run_lesson(lesson, tmp_path / str(workers), *flags)
    assert_same_state(*(load(model_path(tmp_path / name)) for name in ["0", "2"]))


@FORK
def test_augmentation_in_workers_follows_the_seed(lesson, tmp_path, monkeypatch):
    """Two runs with one seed see the same images, although all 16 are different draws of the same picture."""
    path, epochs = paint(tmp_path / "pets", ["cat"], groups=1) / "cat" / "0_1.png", []

    def train_one_epoch(model, loader, *_):
        epochs.append(torch.cat([images for images, _ in loader]))
        return 1.0, 50.0

    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, 50.0))
    pictures = lesson.PictureDataset([path] * 16, [0] * 16, v2.RandomCrop(32, padding=12))
    for name in ["one", "two"]:
        flags = f"--epochs 1 --batch-size 4 --workers 2 --device cpu --output-dir {tmp_path / name}"
        lesson.train(lesson.parse_args(flags.split()), "by_group", pictures, pictures, ["cat"], None, None)
    assert torch.equal(*epochs) and len(epochs[0].unique(dim=0)) > 12


@FORK
@LINUX
def test_many_batches_from_workers_need_few_open_files(lesson, tmp_path):
    """Every batch that a worker has sent holds open files until it is forgotten. Here are 300 for 100 files."""
    resource = importlib.import_module("resource")
    path = paint(tmp_path / "pets", ["cat"], groups=1) / "cat" / "0_1.png"
    pictures = lesson.PictureDataset([path] * 600, [0] * 600)
    loader = DataLoader(pictures, batch_size=2, num_workers=2, timeout=60)  # instead of waiting forever
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 100, hard))
    try:
        mean, std = lesson.measure_pixels(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    image = lesson.read_picture(path).double() / 255
    assert mean.flatten().tolist() == pytest.approx(image.mean(dim=(1, 2)).tolist(), abs=1e-6)


# Using the model


def test_a_trained_model_recognizes_a_picture(lesson, tmp_path, monkeypatch):
    """Here the classes differ by their color. --predict trains and writes nothing, and names the data."""
    folder, accuracies = paint(tmp_path / "pets", ["cat", "dog", "eel"], groups=15), iter(range(50, 70))
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, next(accuracies)))  # the last epoch is the best
    flags = ["--images", folder, *SHORT, "--epochs", 10, "--batch-size", 9, "--lr", 0.01]
    run_lesson(lesson, tmp_path / "out", *flags)
    before = contents(tmp_path / "out")
    for path in folder.glob("*/3_1.png"):
        output = run_lesson(lesson, tmp_path / "out", "--predict", path)
        found = re.fullmatch(r"(.*): (\w+) ([\d.]+) %, \w+ [\d.]+ %, \w+ [\d.]+ % (.*)\n", output)
        assert found[1] == str(path) and found[2] == path.parent.name and float(found[3]) > 50
        assert found[4] == "(a model trained on pets)"
    assert contents(tmp_path / "out") == before


def test_predict_goes_by_the_checkpoint_alone(lesson, tmp_path):
    """Its order of the classes, its mean and its deviation count. The three most probable of four are printed."""
    torch.manual_seed(0)
    model, path = lesson.SimpleCNN(4).eval(), paint(tmp_path / "pets", ["cat"], groups=1) / "cat" / "0_1.png"
    model.fc2.weight.data *= 20  # so that the probabilities differ
    class_to_idx = {"ant": 3, "bee": 1, "cow": 0, "doe": 2}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in [[0.9, 0.1, 0.5], [0.1, 0.5, 0.3]])
    saved = {
        "model": model.state_dict(),
        "class_to_idx": class_to_idx,
        "mean": mean,
        "std": std,
        "data": "farm",
    }
    model_path(tmp_path).parent.mkdir(parents=True)
    torch.save(saved, model_path(tmp_path))
    with torch.no_grad():
        scores = model((lesson.read_picture(path).unsqueeze(0) / 255 - mean) / std).softmax(dim=1)[0]
    best = sorted(class_to_idx, key=lambda name: -scores[class_to_idx[name]])[:3]
    words = ", ".join(f"{name} {100 * scores[class_to_idx[name]].item():.1f} %" for name in best)
    output = run_lesson(lesson, tmp_path, "--predict", path)
    assert output == f"{path}: {words} (a model trained on farm)\n"


def test_predict_without_a_model_or_a_picture_gets_one_sentence(lesson, digits, tmp_path):
    """It says what is missing or cannot be read."""
    (tmp_path / "no.png").write_text("no picture", encoding="utf-8")
    for folder, name, start in [
        (tmp_path, "no.png", f"{model_path(tmp_path)} does not exist. Train a model first."),
        (digits.folder, "no.png", f"Cannot read {tmp_path / 'no.png'}: cannot identify"),
        (digits.folder, "none.png", f"Cannot read {tmp_path / 'none.png'}: "),
    ]:
        with pytest.raises(SystemExit) as error:
            run_lesson(lesson, folder, "--predict", tmp_path / name)
        assert error.value.code.startswith(start) and "\n" not in error.value.code


def test_a_second_run_needs_overwrite(lesson, tmp_path, monkeypatch):
    """It exits with one sentence that names the data of the model that is there. --overwrite replaces the model."""
    folders = [paint(tmp_path / name, ["cat", "dog"]) for name in ["pets", "toys"]]
    runs = iter(["20250101-000001", "20250101-000002", "20250101-000003"])
    monkeypatch.setattr(lesson.time, "strftime", lambda _: next(runs))
    run_lesson(lesson, tmp_path / "out", "--images", folders[0], *SHORT)
    before, path = contents(tmp_path / "out"), model_path(tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path / "out", "--images", folders[1], *SHORT)
    sentence = f"{path} holds a model trained on pets. Use it (--predict) or replace it (--overwrite)."
    assert error.value.code == sentence and contents(tmp_path / "out") == before
    run_lesson(lesson, tmp_path / "out", "--images", folders[1], *SHORT, "--overwrite")
    assert load(path)["data"] == "toys"


@pytest.mark.parametrize("flags", [["--workers", "-1"], ["--overwrite", "--predict", "cat.jpg"]])
def test_flags_that_make_no_sense_get_one_sentence_and_status_2(lesson, tmp_path, capsys, flags):
    """The sentence names the flag. Nothing is written."""
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, *flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and last.count("error: ") == 1 and flags[0] in last
    assert not list(tmp_path.iterdir())
