"""Lesson 11: pictures are read as people see them, every file is accounted for, and no split leaks by accident."""

import importlib
import io
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import read_scalars
from conftest import PATHS, assert_same_state, contents, load, run_lesson
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
DIGITS = {str(i): i for i in range(10)}  # class_to_idx of the digits


@pytest.fixture(scope="module")
def lesson():
    """Lesson 11 under a name by which a pickle can find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATHS["01"].parent)
        yield importlib.import_module(NAME)
    del sys.modules[NAME]


def paint(folder, classes, groups=6):
    """Write a folder with pictures of noise, in groups of one, for every class. Return the folder."""
    for class_name in classes:
        rng = np.random.default_rng(list(class_name.encode()))
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        for group in range(groups):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / class_name / f"{group}_1.png")
    return folder


def model_path(folder):
    return folder / "artifacts" / "checkpoints" / NAME / "best_model.pth"


@pytest.fixture(scope="module")
def digits(lesson, tmp_path_factory):
    """A run of two epochs on pictures that the lesson makes of digits, and what train() was given and returned."""
    run = SimpleNamespace(folder=tmp_path_factory.mktemp("pictures"), trained={}, evaluated=[])
    train, evaluate = lesson.train, lesson.evaluate

    def record(args, split, *rest):
        run.trained[split] = (*rest, train(args, split, *rest))
        return run.trained[split][-1]

    def record_data(model, loader, *rest):
        run.evaluated.append(loader.dataset)
        return evaluate(model, loader, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson, "train", record)
        patch.setattr(lesson, "evaluate", record_data)
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
    """What is transparent becomes white. A middle gray of 16 bits is one of 8 bits. Other ranges are refused."""
    hidden = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    hidden.paste((0, 0, 90, 255), (0, 0, 40, 20))
    hidden.save(tmp_path / "hidden.png")
    image = lesson.read_picture(tmp_path / "hidden.png")
    assert image[:, 8, 16].tolist() == [0, 0, 90] and image[:, 24, 16].tolist() == [255, 255, 255]
    for kind, value in [(np.uint16, 128 * 257 + 90), (np.uint8, 128)]:
        Image.fromarray(np.full((40, 50), value, dtype=kind)).save(tmp_path / "gray.png")
        assert set(lesson.read_picture(tmp_path / "gray.png").flatten().tolist()) == {128}
    Image.fromarray(np.full((40, 50), 0.5, dtype=np.float32)).save(tmp_path / "depths.tiff")
    with pytest.raises(OSError, match="unknown range"):
        lesson.read_picture(tmp_path / "depths.tiff")


def test_the_middle_square_of_a_large_jpeg_is_read_at_a_fraction_of_its_size(lesson, tmp_path, monkeypatch):
    """The image is the same as if the whole picture had been decoded, up to rounding."""
    sizes, transpose, across = [], ImageOps.exif_transpose, np.linspace(0, 255, 1200, dtype=np.uint8)
    pixels = np.full((800, 1200, 3), 90, dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = across, across[:800, None]
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda x: sizes.append(x.size) or transpose(x))
    image = lesson.read_picture(tmp_path / "large.jpg").permute(1, 2, 0).int().numpy()
    assert np.abs(image - pixels[:, 200:1000].reshape(32, 25, 32, 25, 3).mean(axis=(1, 3))).max() < 6
    assert sizes == [(150, 100)]


# The Dataset


def test_the_dataset_gives_what_torchvisions_image_folder_gives(lesson, tmp_path):
    """The line in its docstring is run here."""
    folder, transform = paint(tmp_path / "pets", ["cat", "dog"]), v2.RandomInvert(p=1.0)
    idiom = "ImageFolder(folder, loader=read_picture, transform=transform)"
    assert idiom in lesson.PictureDataset.__doc__
    names = {"ImageFolder": ImageFolder, "folder": folder, "transform": transform}
    usual = eval(idiom, names | vars(lesson))
    paths = sorted(folder.glob("*/*"))
    own = lesson.PictureDataset(paths, [0] * 6 + [1] * 6, transform)
    plain = lesson.PictureDataset(paths, own.labels)
    assert len(own) == len(usual) == len(plain) == 12
    for (image, label), (expected, usual_label), (inverse, _) in zip(own, usual, plain, strict=True):
        assert torch.equal(image, expected) and label == usual_label
        assert torch.equal(image, 255 - inverse)


def test_only_training_images_are_augmented_and_differently_each_time(lesson, digits):
    """Validation and test images are the pictures as they are. Digits are not flipped."""
    train_set = digits.trained["by_group"][0]
    first, second = ([image for image, _ in train_set] for _ in range(2))
    plain = [lesson.read_picture(path) for path in train_set.paths]
    for one, other in [(first, second), (first, plain)]:
        assert sum(map(torch.equal, one, other)) < len(plain) / 4
    flip, crop = train_set.transform.transforms
    assert flip.p == 0 and crop.size == (32, 32) and set(crop.padding) == {2}
    assert len(digits.evaluated) == 6 and {dataset.transform for dataset in digits.evaluated} == {None}


# The files


def test_what_is_left_out_is_named(lesson, tmp_path, capsys):
    """Broken files, files that are no pictures, and copies, in whichever class they are; at most ten of them."""
    names, folder = ["cat", "cat-fish", "dog"], tmp_path / "pictures"
    cat, _, dog = (paint(folder, [name]) / name for name in names)
    (cat / "deep").mkdir()
    Image.new("L", (30, 20), 50).save(cat / "deep" / "small.jfif", format="JPEG")
    expected = sorted(path for path in folder.rglob("*") if path.is_file())
    shutil.copy(cat / "0_1.png", dog / "a copy.png")
    (dog / "cut.png").write_bytes((dog / "1_1.png").read_bytes()[:-300])
    for i in range(9):
        (dog / f"note {i:02}.txt").write_text("no picture", encoding="utf-8")
    paths, labels = lesson.check_files(folder, names)
    assert sorted(paths) == expected and labels.tolist() == [0] * 7 + [1] * 6 + [2] * 6
    assert [path.relative_to(folder).parts[0] for path in paths] == [names[label] for label in labels]
    head, copy, *reasons, rest = capsys.readouterr().out.splitlines()
    assert head == f"{folder}: 7 cat, 6 cat-fish, 6 dog" and rest == "  and 1 more"
    assert copy == f"  left out: {dog / 'a copy.png'} is a copy of another file"
    for line, name in zip(reasons, ["cut.png", *(f"note {i:02}.txt" for i in range(8))], strict=True):
        assert re.match(rf"  left out: {re.escape(str(dog / name))}: \w+", line)


@pytest.mark.parametrize("hidden", ["@eaDir", "#recycle", "$RECYCLE.BIN", ".hidden", "__MACOSX"])
def test_hidden_files_and_folders_are_skipped(lesson, tmp_path, capsys, hidden):
    """Such a folder is no class, and what is in it is neither read nor named. A class may be called train."""
    folder = paint(tmp_path / "pictures", ["train", "ship"])
    for name in [hidden, f"ship/{hidden}", f"train/deep/{hidden}/deeper"]:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / name / "a.png")
    (folder / "ship" / f"{hidden[:2]}0_1.png").write_bytes(b"a Mac leaves such files")
    assert lesson.find_classes(folder) == ["ship", "train"], "in alphabetical order"
    paths, _ = lesson.check_files(folder, ["ship", "train"])
    assert len(paths) == 12 and capsys.readouterr().out == f"{folder}: 6 ship, 6 train\n"


@LINUX
def test_names_that_are_not_utf_8_do_not_stop_the_run(lesson, tmp_path, monkeypatch):
    """They come from old disks and archives. The terminal would refuse to print them."""
    cat, odd = paint(tmp_path / "pictures", ["cat"]) / "cat", os.fsdecode(b"caf\xe9")
    shutil.copy(cat / "0_1.png", cat / f"{odd}.png")
    (cat / f"{odd}.txt").write_bytes(b"no picture")
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert len(lesson.check_files(cat.parent, ["cat"])[0]) == 6


# The classes


@pytest.mark.parametrize(
    "names", [["train", "val", "test"], ["valid", "train"], ["Testing", "Training", "x"]]
)
def test_folders_that_are_splits_are_refused(lesson, tmp_path, names):
    """They would be learned as classes. The sentence names them, and the folder to give instead."""
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path / "out", "--images", tmp_path, *SHORT)
    sentence, training = error.value.code, next(name for name in names if name.lower().startswith("train"))
    assert sentence.endswith(f" in {tmp_path} are splits, not classes. Give --images {tmp_path / training}")
    assert set(sentence.split(" in ")[0].split(", ")) == set(names) - {"x"}
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_gets_one_sentence(lesson, tmp_path):
    """It needs two classes with five groups of pictures each. Nothing is written."""
    folder = tmp_path / "pictures"

    def refusal():
        with pytest.raises(SystemExit) as error:
            run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT)
        assert not (tmp_path / "out").exists()
        return error.value.code

    assert refusal() == f"There is no folder {folder}."
    Image.new("RGB", (9, 9)).save(paint(folder, ["cat"]) / "a picture.png")
    assert refusal() == f"{folder} must hold a folder for every class, at least two."
    for groups in [0, 4]:
        paint(folder, ["dog"], groups)
        assert refusal().startswith("The class dog has fewer than 5 groups of pictures.")


# The groups and the split


def test_a_group_is_the_name_before_the_last_number(lesson, tmp_path, capsys):
    """It ends in _1, -2 or (3). A subfolder of a class is one group."""
    groups = {"tom": ["tom_1.jpg", "tom-2.jpg", "tom (3).jpg", "tom(4).png"], "tom-cat": ["tom-cat_12.jpg"]}
    groups |= {"a.b": ["a.b_1.jpg"], "13": ["13.jpg"], "rex": ["rex.jpg"]}
    groups |= {"beach": ["beach/x.jpg", "beach/y_1.jpg"], "beach/hut": ["beach/hut/x.jpg"]}
    names = [(f"{c}/{g}", f"{c}/{name}") for c in ["x_1", "y"] for g in groups for name in groups[g]]
    found = lesson.find_groups(tmp_path, [tmp_path / name for _, name in names])
    assert [group.replace(os.sep, "/") for group in found] == [group for group, _ in names]
    assert capsys.readouterr().out == "14 groups, 4 of them with more than one picture\n"


def test_running_numbers_are_no_groups(lesson, tmp_path, capsys):
    """The names of a camera say nothing about siblings, so every picture is its own group. That is said."""
    paths = [tmp_path / name / f"IMG_{i:04}.jpg" for name in ["cat", "dog"] for i in range(30)]
    assert len(set(lesson.find_groups(tmp_path, paths))) == 60
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("The names show too few groups, so every picture is its own.")
    assert second == "60 groups, 0 of them with more than one picture"


def test_the_split_keeps_groups_together_where_it_promises_to(lesson):
    """The test set has groups of its own. by_file has siblings of training pictures in the validation set."""
    sizes = {f"{name}/{i}": 1 + i % 4 for name in ["cat", "dog"] for i in range(40)}
    groups = np.array([group for group, size in sizes.items() for _ in range(size)])
    labels = np.array([int(group.startswith("dog")) for group in groups])
    splits = {name: lesson.split_pictures(labels, groups, name, 0) for name in ["by_file", "by_group"]}
    for name, parts in splits.items():
        assert sorted(np.concatenate(parts)) == list(range(200))
        for part, share in zip(parts, [0.6, 0.2, 0.2], strict=True):
            assert len(part) == pytest.approx(200 * share, abs=4)
            assert labels[part].mean() == pytest.approx(0.5, abs=0.06), "as many cats as dogs"
        train, val, test = (set(groups[part]) for part in parts)
        assert not test & (train | val)
        assert len(train & val) > len(val) / 2 if name == "by_file" else not train & val
        again, other = (lesson.split_pictures(labels, groups, name, seed) for seed in [0, 1])
        for part, same, different in zip(parts, again, other, strict=True):
            assert np.array_equal(part, same) and not np.array_equal(part, different)
    assert np.array_equal(splits["by_file"][2], splits["by_group"][2]), "both have the same test set"


# The pictures that the lesson makes


def test_the_made_folder_has_every_kind_of_picture(digits):
    """Four shots of each of five digits per class, some turned, some gray, one file broken, and one a copy."""
    kinds = Counter()
    for path in digits.pictures.rglob("*.*"):
        with Image.open(path) as picture:
            kinds[picture.mode, picture.getexif().get(ORIENTATION, 1)] += 1
    assert set(kinds) == {("RGB", 1), ("RGB", 3), ("RGB", 6), ("RGB", 8), ("L", 1)}
    assert kinds.total() == 201 and kinds["L", 1] < 70 < kinds["RGB", 1]
    assert "50 groups, 50 of them with more than one picture\n" in digits.output
    copy, broken = re.findall(r"left out: (.*)", digits.output)
    assert copy == f"{digits.pictures / '0' / 'copy.jpg'} is a copy of another file"
    assert str(digits.pictures / "9" / "004_4.jpg") in broken and "truncated" in broken
    assert "Device: cpu | digits: 199 pictures\n" in digits.output


def test_shots_show_the_digit_of_their_group_upright(lesson, digits):
    """Their pixels correlate by 0.51 with those of the digit. The wrong digits would have 0.17, turned ones 0.13."""
    images, labels, *_ = lesson.load_data("digits", digits.folder, train=True)
    correlations = []
    for path in digits.pictures.glob("[1-8]/*"):
        digit = images[labels == int(path.parent.name)][int(path.stem[:3])]
        pixels = torch.stack([digit, lesson.read_picture(path)])[:, :, 4:28, 4:28].float().mean(dim=1)
        correlations.append(torch.corrcoef(pixels.flatten(1))[0, 1].item())
    assert len(correlations) == 160 and np.mean(correlations) > 0.49


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
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (shutil.copytree(a, b), replace(a, b)))
    folder, _ = make_few_pictures(lesson, tmp_path)
    assert len(contents(folder)) == 201 and list(folder.parent.iterdir()) == [folder]


# A run


def test_mean_and_deviation_are_those_of_the_training_pictures(lesson, digits):
    """They are computed again by NumPy, from the pictures without augmentation, and for batches of unequal size."""
    train_set, _, _, mean, std, _ = digits.trained["by_group"]
    images = torch.stack([lesson.read_picture(path) for path in train_set.paths])
    assert mean.shape == std.shape == (3, 1, 1) and mean.dtype == std.dtype == torch.float32
    for found in [(mean, std), lesson.measure_pixels([(images[:70], None), (images[70:], None)])]:
        for value, expected in zip(found, [np.mean, np.std], strict=True):
            pixels = expected(images.numpy() / 255, axis=(0, 2, 3))
            assert value.flatten().numpy() == pytest.approx(pixels, abs=1e-6)


def test_training_is_sgd_with_momentum_on_normalized_images(lesson, images, tmp_path, monkeypatch):
    """Weights and metrics are worked out again. The initial weights and the order of the images follow the seed."""
    flags = "--epochs 1 --batch-size 8 --lr 0.03 --seed 3 --workers 0 --device cpu --output-dir".split()
    mean, std = torch.tensor([[0.3, 0.4, 0.5], [0.1, 0.2, 0.3]]).view(2, 3, 1, 1)
    args, loss, correct = lesson.parse_args([*flags, str(tmp_path)]), 0, 0
    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    best, _ = lesson.train(args, "by_group", images, images, list(DIGITS), mean, std)
    torch.manual_seed(3)
    model = lesson.SimpleCNN().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for batch, labels in DataLoader(images, 8, shuffle=True, generator=torch.Generator().manual_seed(3)):
        logits = model((batch / 255 - mean) / std)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        loss += F.cross_entropy(logits, labels, reduction="sum").item() / 20
        correct += (logits.argmax(dim=1) == labels).sum().item()
    for name, weights in model.state_dict().items():
        assert torch.allclose(best.state_dict()[name], weights, atol=5e-4), name
    assert best.conv1.weight.is_contiguous(memory_format=torch.channels_last), "faster on CPUs"
    batch, labels = images.tensors
    logits = model.eval()((batch / 255 - mean) / std)
    expected = {"Loss/val": F.cross_entropy(logits, labels).detach(), "Loss/train": loss, "Seconds": 1}
    expected |= {"Accuracy/val": 5 * (logits.argmax(dim=1) == labels).sum(), "Accuracy/train": 5 * correct}
    [run] = (tmp_path / "tensor_board" / NAME / "by_group").iterdir()
    for name, value in expected.items():
        assert read_scalars(run)[name] == [(1, pytest.approx(float(value), rel=1e-4))], name
    [(_, gap)] = read_scalars(run)["Overfitting/accuracy_gap"]
    assert gap == pytest.approx(float(expected["Accuracy/train"] - expected["Accuracy/val"]), abs=1e-4)


def test_printed_accuracies_are_those_of_the_best_models(lesson, digits):
    """They are computed again from the files of the split. The validation accuracy is the highest of its curve."""
    paths = [p for p in sorted(digits.pictures.glob("*/0*")) if p.parent.name + p.name != "9004_4.jpg"]
    images, labels = torch.stack(list(map(lesson.read_picture, paths))), [int(p.parent.name) for p in paths]
    groups, labels = np.array([f"{p.parent.name}/{p.name[:3]}" for p in paths]), np.array(labels)
    rows = re.findall(r"^  (by_\w+) +([\d.]+) % +([\d.]+) %$", digits.output, flags=re.MULTILINE)
    assert [split for split, *_ in rows] == ["by_file", "by_group"]
    for split, *printed in rows:
        *_, mean, std, (model, _) = digits.trained[split]
        _, val, test = lesson.split_pictures(labels, groups, split, 42)
        for part, accuracy in zip([val, test], printed, strict=True):
            with torch.no_grad():
                answers = model.eval()((images[part] / 255 - mean) / std).argmax(dim=1).numpy()
            assert float(accuracy) == pytest.approx(100 * np.mean(answers == labels[part]), abs=0.006)
        [run] = (digits.folder / "tensor_board" / NAME / split).iterdir()
        curve = read_scalars(run)["Accuracy/val"]
        assert float(printed[0]) == pytest.approx(max(value for _, value in curve), abs=0.006)


def test_the_checkpoint_says_which_output_is_which_class(lesson, digits):
    """It holds the best model of by_group, and with it all that is needed to use the model."""
    checkpoint = load(model_path(digits.folder))
    *_, mean, std, (model, _) = digits.trained["by_group"]
    assert_same_state(dict(checkpoint.pop("model")), dict(model.state_dict()))
    assert_same_state(checkpoint, {"class_to_idx": DIGITS, "mean": mean, "std": std, "data": "digits"})
    assert f"Model, trained on the split by_group: {model_path(digits.folder)}\n" in digits.output


def test_the_best_epoch_is_tested_once_and_kept(lesson, tmp_path, monkeypatch):
    """Of two equal epochs it is the first. Own pictures are flipped, and split by group only."""
    seen, accuracies, flip, flips = [], iter([20.0, 60.0, 60.0, 40.0, 55.0]), v2.RandomHorizontalFlip, []

    def evaluate(model, *_):
        seen.append({name: weights.clone() for name, weights in model.state_dict().items()})
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    monkeypatch.setattr(v2, "RandomHorizontalFlip", lambda p: flips.append(p) or flip(p))
    folder = paint(tmp_path / "my pets", ["cat", "dog"])
    output = run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT, "--epochs", 4)
    best = load(model_path(tmp_path / "out"))
    assert len(seen) == 5 and best["data"] == "my pets" and best["class_to_idx"] == {"cat": 0, "dog": 1}
    assert_same_state(seen[4], seen[1])
    assert_same_state(dict(best["model"]), seen[1])
    assert re.search(r"^  by_group +60\.00 % +55\.00 %$", output, flags=re.MULTILINE) and flips == [0.5]
    assert "by_file" not in output and "Device: cpu | my pets: 12 pictures\n" in output


def test_a_loss_that_is_not_finite_gets_one_sentence(lesson, tmp_path, monkeypatch):
    folder = paint(tmp_path / "pets", ["cat", "dog"])
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (float("nan"), 10.0))
    with pytest.raises(SystemExit, match=r"^The loss is no longer a finite number\. Try a smaller"):
        run_lesson(lesson, tmp_path / "out", "--images", folder, *SHORT)


def test_the_sheet_shows_the_pictures_as_the_model_sees_them(lesson, digits):
    """The first four of every class are in custom_dataset.png, three times as large."""
    path = digits.folder / "artifacts" / "custom_dataset.png"
    assert f"as the model sees them: {path}\n" in digits.output
    for row, column in [(0, 0), (3, 1), (9, 3)]:
        tile = np.asarray(Image.open(path))[3 + 98 * row :: 3, 3 + 98 * column :: 3][:32, :32]
        image = lesson.read_picture(digits.pictures / str(row) / f"000_{column + 1}.jpg")
        assert (tile == image.permute(1, 2, 0).numpy()).all()


# Workers


def test_the_dataset_travels_to_workers_as_a_pickle(lesson, digits):
    """So it does on Windows and macOS, where every worker imports the lesson anew."""
    train_set = digits.trained["by_group"][0]
    copy = pickle.loads(pickle.dumps(train_set))
    assert copy.paths == train_set.paths and list(copy.labels) == list(train_set.labels)
    assert len(copy.transform.transforms) == 2


@FORK
def test_a_run_with_workers_can_be_repeated(lesson, tmp_path):
    """The images, their order and their augmentation follow the seed, so that all weights are the same."""
    folder = paint(tmp_path / "pets", ["cat", "dog"])
    for name in ["one", "two"]:
        run_lesson(lesson, tmp_path / name, "--images", folder, *SHORT, "--workers", 1)
    assert_same_state(*(load(model_path(tmp_path / name)) for name in ["one", "two"]))


@LINUX
def test_many_batches_from_workers_need_few_open_files(lesson, tmp_path):
    """A tensor from a worker holds an open file until it is forgotten. Here are 300 batches for 100 files."""
    resource = importlib.import_module("resource")
    path = paint(tmp_path / "pets", ["cat"], groups=1) / "cat" / "0_1.png"
    pictures = lesson.PictureDataset([path] * 300, [0] * 300)
    loader = DataLoader(pictures, 1, num_workers=1, timeout=120, multiprocessing_context="fork")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        mean, _ = lesson.measure_pixels(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.allclose(mean.flatten(), lesson.read_picture(path).float().mean(dim=(1, 2)) / 255)


# Using the model


def test_predict_goes_by_the_checkpoint_alone(lesson, tmp_path):
    """Its classes, mean and deviation count. The three most probable are printed, and nothing is written."""
    torch.manual_seed(0)
    model, path = lesson.SimpleCNN(4).eval(), paint(tmp_path / "pets", ["cat"], groups=1) / "cat" / "0_1.png"
    model.fc2.weight.data *= 20  # so that the probabilities differ
    class_to_idx = {"ant": 3, "bee": 1, "cow": 0, "doe": 2}
    mean, std = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.5, 0.3]]).view(2, 3, 1, 1)
    saved = {"model": model.state_dict(), "class_to_idx": class_to_idx, "mean": mean, "std": std}
    model_path(tmp_path).parent.mkdir(parents=True)
    torch.save({**saved, "data": "farm"}, model_path(tmp_path))
    before = contents(tmp_path)
    with torch.no_grad():
        scores = model((lesson.read_picture(path).unsqueeze(0) / 255 - mean) / std).softmax(dim=1)[0]
    best = sorted(class_to_idx, key=lambda name: -scores[class_to_idx[name]])[:3]
    words = ", ".join(f"{name} {100 * scores[class_to_idx[name]].item():.1f} %" for name in best)
    output = run_lesson(lesson, tmp_path, "--predict", path)
    assert output == f"{path}: {words} (a model trained on farm)\n" and contents(tmp_path) == before


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


def test_a_second_run_needs_overwrite(lesson, tmp_path):
    """It exits with one sentence that names the data of the model that is there. --overwrite replaces the model."""
    folder, path = paint(tmp_path / "pets", ["cat", "dog"]), model_path(tmp_path)
    path.parent.mkdir(parents=True)
    torch.save({"data": "toys"}, path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, "--images", folder, *SHORT)
    sentence = f"{path} holds a model trained on toys. Use it (--predict) or replace it (--overwrite)."
    assert error.value.code == sentence and contents(tmp_path) == before
    output = run_lesson(lesson, tmp_path, "--images", folder, *SHORT, "--subset", 3, "--overwrite")
    assert load(path)["data"] == "pets" and "by_group: 3 + " in output


@pytest.mark.parametrize("flags", [["--workers", "-1"], ["--overwrite", "--predict", "cat.jpg"]])
def test_flags_that_make_no_sense_get_one_sentence_and_status_2(lesson, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, *flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and flags[0] in last and not list(tmp_path.iterdir())
