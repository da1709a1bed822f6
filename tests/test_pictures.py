"""Lesson 11: pictures in a folder as people see them, a table that hides nothing, and a split that does not leak."""

import contextlib
import importlib
import os
import random
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, PATHS, assert_same_state, checkpoints_of, load, run_lesson
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

NAME = "11_custom_dataset"
FLAGS = ["--subset", 120, "--batch-size", 32]  # 5 scenes of each class: 200 pictures


@pytest.fixture(scope="module")
def lesson():
    """Lesson 11 under a name by which the workers of a DataLoader can import it, however they are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATHS["01"].parent)
        yield importlib.import_module(NAME)
    del sys.modules[NAME]


@pytest.fixture(scope="module")
def finished(lesson, tmp_path_factory):
    """One run of two epochs on the folder that the lesson makes of digits."""
    folder = tmp_path_factory.mktemp("pictures")
    output = run_lesson(lesson, folder, *FLAGS, "--epochs", 2)
    run = folder / "artifacts" / "checkpoints" / NAME / "digits_run_1"
    pictures = folder / "artifacts" / NAME / "digits_5_scenes"
    return SimpleNamespace(folder=folder, output=output, run=run, pictures=pictures)


def paint(folder, classes, pictures=6, name="{}_1.png", seed=0):
    """Write a folder of pictures of noise, every class in a colour of its own."""
    rng = np.random.default_rng(seed)
    for number, class_name in enumerate(classes):
        (folder / class_name).mkdir(parents=True)
        for i in range(pictures):
            pixels = rng.integers(0, 100, (40, 50, 3), dtype=np.uint8)
            pixels[..., number % 3] += 120
            Image.fromarray(pixels).save(folder / class_name / name.format(i))
    return folder


def recognized(lesson, path, files, class_to_idx):
    """Return the share, in percent, of the files that the network in a checkpoint takes for their folder's class."""
    model = lesson.SimpleCNN(len(class_to_idx))
    model.load_state_dict(load(path)["model"])
    images = torch.stack([lesson.to_pixels(lesson.read_picture(file)) for file in files])
    labels = torch.tensor([class_to_idx[file.parent.name] for file in files])
    with torch.no_grad():
        right = model.eval()(lesson.to_input(images, CPU)).argmax(dim=1) == labels
    return 100 * right.double().mean().item()


# A picture


def test_a_picture_is_upright_red_green_blue_and_on_white(lesson, tmp_path):
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20, :20] = [200, 100, 0]  # the upper left quarter
    for orientation, turns in [(1, 0), (3, 2), (6, 1), (8, 3)]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.rot90(pixels, turns)).save(tmp_path / f"turned_{orientation}.png", exif=exif)
        image = lesson.to_pixels(lesson.read_picture(tmp_path / f"turned_{orientation}.png"))
        assert image.shape == (32, 32, 3) and image.dtype == torch.uint8
        assert image[8, 8].tolist() == [200, 100, 0] and image[24, 24].tolist() == [0, 0, 0], orientation
        assert image[8, 24].tolist() == image[24, 8].tolist() == [0, 0, 0], orientation
    hidden = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    hidden.paste((0, 0, 90, 255), (0, 0, 40, 20))
    hidden.save(tmp_path / "hidden.png")
    image = lesson.to_pixels(lesson.read_picture(tmp_path / "hidden.png"))
    assert image[8, 16].tolist() == [0, 0, 90] and image[24, 16].tolist() == [255, 255, 255]
    Image.fromarray(np.full((40, 50), 128 * 257, dtype=np.uint16)).save(tmp_path / "16_bits.png")
    Image.fromarray(np.full((40, 50), 128, dtype=np.uint8)).save(tmp_path / "grey.png")
    for name in ["16_bits.png", "grey.png"]:
        assert set(lesson.to_pixels(lesson.read_picture(tmp_path / name)).flatten().tolist()) == {128}, name


def test_the_middle_square_is_used_and_a_large_jpeg_looks_as_if_all_of_it_was_decoded(lesson, tmp_path):
    across = np.linspace(0, 255, 1200, dtype=np.uint8)
    pixels = np.stack([np.tile(across, (800, 1)), np.tile(across[:800, None], (1, 1200))], axis=2)
    pixels = np.concatenate([pixels, np.full((800, 1200, 1), 90, dtype=np.uint8)], axis=2)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    image = lesson.to_pixels(lesson.read_picture(tmp_path / "large.jpg")).int()
    blocks = pixels[:, 200:1000].reshape(32, 25, 32, 25, 3).mean(axis=(1, 3))
    assert np.abs(image.numpy() - blocks).max() < 6
    decoded = lesson.read_picture(tmp_path / "large.jpg").size
    assert decoded == (150, 100), "at an eighth of its size, which takes a fraction of the time"


def test_what_is_no_whole_picture_is_named_with_the_reason(lesson, tmp_path):
    Image.new("RGB", (500, 500), (9, 99, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    Image.fromarray(np.full((40, 50), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    reasons = {
        "cut.jpg": "truncated",
        "phone.heic": "convert HEIC",
        "float.tiff": "range",
        "none.png": "No such",
    }
    for name, reason in reasons.items():
        with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / name))}.*{reason}") as error:
            lesson.read_picture(tmp_path / name)
        assert "\n" not in str(error.value)


def test_files_are_closed_again(lesson, finished, monkeypatch):
    """The broken one, the last, too."""
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(original(path)) or opened[-1])
    for path in sorted(finished.pictures.glob("9/*")):
        with contextlib.suppress(OSError):
            lesson.read_picture(path)
    assert len(opened) == 20
    for picture in opened:
        assert getattr(picture, "fp", None) is None or picture.fp.closed


# The Dataset


def test_torchvisions_idiom_gives_the_same_images_and_labels(lesson, finished, tmp_path):
    """As the docstring has it; with its own loader, those that are turned or transparent are others."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.pictures, folder)
    (folder / "9" / "004_4.jpg").unlink(missing_ok=True)  # broken: ImageFolder would stop there
    idiom = "ImageFolder(folder, loader=read_picture, transform=to_pixels)"
    assert idiom in lesson.PictureFolder.__doc__
    usual = eval(idiom, {"ImageFolder": ImageFolder, "folder": folder} | vars(lesson))
    names = [os.path.relpath(path, folder).replace(os.sep, "/") for path, _ in usual.samples]
    own = lesson.PictureFolder(folder, names, {str(i): i for i in range(10)})
    assert usual.class_to_idx == own.class_to_idx and len(usual) == len(own) == 200
    same = {"plain": [], "other": []}
    bare = ImageFolder(folder, transform=lesson.to_pixels)
    for i, name in enumerate(names):
        image, label = own[i]
        assert torch.equal(image, usual[i][0]) and label == usual[i][1] == int(name.split("/")[0])
        with Image.open(folder / name) as file:
            plain = file.getexif().get(0x0112, 1) == 1 and file.mode != "RGBA"
        same["plain" if plain else "other"].append(torch.equal(image, bare[i][0]))
    assert all(same["plain"]) and len(same["other"]) > 40 and not any(same["other"])


def test_workers_that_import_the_lesson_anew_read_the_same(lesson, finished):
    """As on Windows and macOS: the Dataset travels to them as a pickle."""
    names = [f"{label}/000_1{next(finished.pictures.glob(f'{label}/000_1.*')).suffix}" for label in range(4)]
    pictures = lesson.PictureFolder(finished.pictures, names, {str(i): i for i in range(10)})
    [(images, labels)] = DataLoader(pictures, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(images, torch.stack([pictures[i][0] for i in range(4)]))


# The table


def test_table_counts_every_file_and_names_what_is_left_out(lesson, tmp_path, capsys):
    folder = paint(tmp_path / "pictures", ["cat", "dog", "cat-fish"])
    (folder / "cat" / "deep").mkdir()
    Image.new("L", (30, 20), 50).save(folder / "cat" / "deep" / "small.jfif", format="JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200), "red").save(folder / "dog" / "large.jpg", exif=exif)
    shutil.copy(folder / "cat" / "0_1.png", folder / "dog" / "0_1 copy.png")
    (folder / "dog" / "cut.jpg").write_bytes((folder / "dog" / "large.jpg").read_bytes()[:-300])
    (folder / "dog" / "notes.txt").write_text("no picture", encoding="utf-8")
    (folder / "cat" / "._0_1.png").write_bytes(b"a Mac leaves these")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "dog" / "large.jpg", folder / ".ipynb_checkpoints" / "large.jpg")
    pictures = lesson.look_through(folder)
    head, titles, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{folder}: 2 JPEG, 1 L, 18 PNG, 19 RGB, 1 turned by EXIF"
    assert titles.split() == "class pictures left out smallest largest".split()
    assert [row.split() for row in rows[:4]] == [
        "cat 7 0 30 x 20 50 x 40".split(),
        "cat-fish 6 0 50 x 40 50 x 40".split(),
        "dog 7 3 50 x 40 300 x 200".split(),
        "in all 20 3".split(),
    ]
    assert len(rows) == 7 and all(row.startswith("    ") for row in rows[4:])
    dog = folder / "dog"
    assert rows[4].strip() == f"{dog / '0_1 copy.png'} is a copy of cat/0_1.png."
    assert str(dog / "cut.jpg") in rows[5] and str(dog / "notes.txt") in rows[6]
    assert pictures.class_to_idx == {"cat": 0, "cat-fish": 1, "dog": 2}
    assert len(pictures.names) == len(pictures) == 20 and "cat/deep/small.jfif" in pictures.names
    assert pictures.labels == [pictures.class_to_idx[name.split("/")[0]] for name in pictures.names]


@pytest.mark.parametrize("content", ["nothing", "pictures alone"])
def test_a_folder_without_classes_is_refused_in_a_sentence(lesson, tmp_path, content):
    if content == "pictures alone":
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="must hold folders that are named after the classes: there is none"):
        run_lesson(lesson, tmp_path / "out", "--images", tmp_path)


# Groups and the split


def named(lesson, folder, names):
    """Return a PictureFolder of names; no file is opened."""
    classes = sorted({name.split("/")[0] for name in names})
    return lesson.PictureFolder(folder, names, {name: i for i, name in enumerate(classes)})


def test_a_group_is_the_name_before_its_last_number(lesson, tmp_path, capsys):
    ends = [
        "beach_1.jpg",
        "beach_22.png",
        "old-town-3.jpg",
        "old-town-4.jpeg",
        "a.b_1.jpg",
        "13.jpg",
        "pier.jpg",
    ]
    names = [f"{name}/{end}" for name in ["x_1", "y"] for end in ends]
    groups = lesson.find_groups(named(lesson, tmp_path, names))
    expected = ["beach", "beach", "old-town", "old-town", "a.b", "13", "pier"]
    assert groups == [f"{name}/{group}" for name in ["x_1", "y"] for group in expected]
    assert "10 groups. The first, x_1/beach, has 2 pictures." in capsys.readouterr().out


def test_running_numbers_are_no_groups(lesson, tmp_path, capsys):
    names = [f"{name}/IMG_{i:04}.jpg" for name in ["cat", "dog"] for i in range(30)]
    pictures = named(lesson, tmp_path, names)
    assert lesson.find_groups(pictures) == names
    assert "every picture counts as a group" in capsys.readouterr().out


def test_a_class_with_too_few_pictures_is_refused_in_a_sentence(lesson, tmp_path):
    paint(tmp_path / "pictures", ["cat", "dog"])
    for path in sorted((tmp_path / "pictures" / "dog").iterdir())[:2]:
        path.unlink()
    with pytest.raises(SystemExit, match="takes two classes with five pictures each"):
        run_lesson(lesson, tmp_path / "out", "--images", tmp_path / "pictures")
    shutil.rmtree(tmp_path / "pictures" / "dog")
    with pytest.raises(SystemExit, match="takes two classes with five pictures each"):
        run_lesson(lesson, tmp_path / "out", "--images", tmp_path / "pictures")
    (tmp_path / "pictures" / "dog").mkdir()
    with pytest.raises(SystemExit, match="takes two classes with five pictures each"):
        run_lesson(lesson, tmp_path / "out", "--images", tmp_path / "pictures")


@pytest.mark.parametrize("split", ["by_file", "by_group"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_keeps_groups_together_where_it_promises_to(lesson, tmp_path, split, seed):
    shots = Counter({f"{name}/{i}": 1 + i % 5 for name in ["cat", "dog"] for i in range(50)})
    names = [f"{group}_{shot}.jpg" for group, count in shots.items() for shot in range(count)]
    pictures = named(lesson, tmp_path, names)
    groups = [re.sub(r"_\d+\.jpg", "", name) for name in names]
    parts = lesson.split_pictures(pictures, groups, split, seed, 50_000)
    assert sorted(index for part in parts for index in part) == list(range(len(names)))
    train, val, test = ({groups[i] for i in part} for part in parts)
    assert not test & (train | val), "nothing of the test has been seen"
    assert len(test) == 20 and sum(group.startswith("cat/") for group in test) == 10
    if split == "by_group":
        assert not train & val and (len(train), len(val)) == (60, 20)
        assert sum(group.startswith("cat/") for group in val) == 10
    else:
        assert len(train & val) > 20, "the leak that this split is to show"
        assert len(parts[1]) == pytest.approx(len(parts[0]) / 3, abs=1)
    again = lesson.split_pictures(pictures, groups, split, seed, 50_000)
    other = lesson.split_pictures(pictures, groups, split, seed + 1, 50_000)
    short = lesson.split_pictures(pictures, groups, split, seed, 7)
    assert again == parts and list(map(len, short)) == [7, 7, 7]
    assert all(set(one) != set(part) for one, part in zip(other, parts, strict=True))
    assert all(set(few) <= set(part) for few, part in zip(short, parts, strict=True))


def test_both_splits_have_the_same_test(lesson, tmp_path):
    names = [f"{name}/{i}_{shot}.jpg" for name in ["cat", "dog"] for i in range(20) for shot in range(3)]
    pictures = named(lesson, tmp_path, names)
    groups = [name.split("_")[0] for name in names]
    by_file, by_group = (lesson.split_pictures(pictures, groups, by, 3, 30) for by in ["by_file", "by_group"])
    assert by_file[2] == by_group[2] and by_file[0] != by_group[0]


# A run


def test_the_made_up_folder_has_every_kind_of_picture(finished):
    files = sorted(path for path in finished.pictures.rglob("*") if path.is_file())
    assert len(files) == 201 and not list(finished.pictures.parent.glob("*.unfinished"))
    kinds = Counter()
    for path in files:
        with Image.open(path) as picture:
            kinds[picture.format, picture.mode, picture.getexif().get(0x0112, 1)] += 1
    assert {key[0] for key in kinds} == {"JPEG", "PNG"} and {key[1] for key in kinds} == {"RGB", "L", "RGBA"}
    assert {key[2] for key in kinds} == {1, 3, 6, 8} and sum(kinds.values()) == 201
    assert re.search(r"in all +199 +2\n", finished.output)
    assert "is a copy of 0/000_1" in finished.output and re.search(
        r"9.004_4\.\w+ as a picture", finished.output
    )
    assert "50 groups. The first, 0/000, has 4 pictures." in finished.output


def test_shots_of_a_scene_look_alike_once_they_are_turned_upright(lesson, finished):
    """A shot resembles the others of its scene more than it would upside down."""
    images = {}
    for path in finished.pictures.glob("[1-8]/*_*"):
        pixels = lesson.to_pixels(lesson.read_picture(path))[4:28, 4:28].float().mean(dim=2).flatten()
        images[(path.parent.name, *path.stem.split("_"))] = (pixels - pixels.mean()) / pixels.std()
    near = [(images[c, s, a] * images[c, s, b]).mean() for c, s, a in images for b in "1234" if b > a]
    turned = [(images[c, s, a].view(24, 24).rot90(2).flatten() * images[c, s, b]).mean()
              for c, s, a in images for b in "1234" if b > a]  # fmt: skip
    assert torch.stack(near).mean() > torch.stack(turned).mean() + 0.2


def test_a_folder_that_was_not_finished_is_written_anew(lesson, tmp_path, monkeypatch):
    """And one that is there is used as it is."""
    args = lesson.parse_args(
        ["--data", "digits", "--subset", "1", "--device", "cpu", "--output-dir", str(tmp_path)]
    )
    save, saved = Image.Image.save, []

    def stop(picture, *rest, **options):
        if len(saved) == 20:
            raise KeyboardInterrupt
        saved.append(save(picture, *rest, **options))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", stop)
        lesson.make_pictures(args)
    folder = tmp_path / "artifacts" / NAME / "digits_5_scenes"
    assert not folder.exists()
    assert lesson.make_pictures(args) == (folder, "digits") and len(list(folder.glob("*/*"))) == 201
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    lesson.make_pictures(args)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_printed_accuracies_are_those_of_the_best_models_on_their_pictures(lesson, finished):
    """Worked out again from the files: the split by the names, the answers by the checkpoints."""
    names = sorted(path.relative_to(finished.pictures).as_posix() for path in finished.pictures.glob("*/0*"))
    names = [name for name in names if not name.startswith("9/004_4")]
    groups = [name.split("_")[0] for name in names]
    class_to_idx = {str(i): i for i in range(10)}
    pictures = lesson.PictureFolder(finished.pictures, names, class_to_idx)
    rows = re.findall(r"^  (by_\w+) +([\d.]+) % +([\d.]+) %$", finished.output, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == ["by_file", "by_group"]
    for name, val_accuracy, test_accuracy in rows:
        best = finished.run / name / "best_model.pth"
        _, val, test = lesson.split_pictures(pictures, groups, name, 42, 120)
        for part, printed in [(val, val_accuracy), (test, test_accuracy)]:
            files = [finished.pictures / names[i] for i in part]
            assert float(printed) == pytest.approx(recognized(lesson, best, files, class_to_idx), abs=0.006)
        history = load(finished.run / name / "latest_checkpoint.pth")["history"]
        assert float(val_accuracy) == pytest.approx(max(row["Accuracy/val"] for row in history), abs=0.006)


def test_the_test_is_taken_once_by_the_best_model(lesson, tmp_path, monkeypatch):
    """It is that of epoch 2 of 3."""
    seen, accuracies = [], iter([20.0, 60.0, 40.0, 55.0])

    def evaluate(model, *_):
        seen.append({name: weights.clone() for name, weights in model.state_dict().items()})
        return 1.0, next(accuracies)

    monkeypatch.setattr(lesson, "evaluate", evaluate)
    folder = paint(tmp_path / "pets", ["cat", "dog"])
    output = run_lesson(
        lesson, tmp_path, "--images", folder, "--epochs", 3, "--batch-size", 4, "--workers", 0
    )
    best = load(tmp_path / "artifacts" / "checkpoints" / NAME / "pets_run_1" / "by_group" / "best_model.pth")
    assert len(seen) == 4 and len(best["history"]) == 2
    assert_same_state(dict(best["model"]), seen[-1])
    assert re.search(r"^  by_group +60\.00 % +55\.00 %$", output, flags=re.MULTILINE)


def test_checkpoints_say_which_output_is_which_folder(finished):
    for path in finished.run.glob("*/*.pth"):
        checkpoint = load(path)
        assert checkpoint["class_to_idx"] == {str(i): i for i in range(10)}
        assert checkpoint["class_names"] == list("0123456789") and checkpoint["model"]["fc2.bias"].shape == (
            10,
        )


def test_the_sheet_shows_what_the_network_sees(lesson, finished):
    sheet = np.asarray(Image.open(finished.folder / "artifacts" / "custom_dataset.png"))
    for label in range(10):
        for shot in range(4):
            path = next(finished.pictures.glob(f"{label}/000_{shot + 1}.*"))
            top, left = 2 + 98 * label, 2 + 98 * shot
            tile = sheet[top + 1 : top + 96 : 3, left + 1 : left + 96 : 3]
            assert (tile == lesson.to_pixels(lesson.read_picture(path)).numpy()).all(), path


def test_from_files_in_two_processes_the_training_is_the_same_to_the_last_bit(lesson, finished, tmp_path):
    shutil.copytree(finished.pictures, tmp_path / "artifacts" / NAME / finished.pictures.name)
    output = run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 2, "--lazy", "--workers", 2)
    assert "from memory" in finished.output and "from memory" not in output
    run = tmp_path / "artifacts" / "checkpoints" / NAME / "digits_run_1"
    for arm in ["by_file", "by_group"]:
        one, other = (load(folder / arm / "latest_checkpoint.pth") for folder in [finished.run, run])
        assert_same_state(one, other)


def test_memory_holds_every_picture_once_and_says_what_it_gains(lesson, finished, monkeypatch, capsys):
    ticks = iter([10.0, 13.0, 13.5])  # three seconds for three pictures from files, half a second from memory
    monkeypatch.setattr(lesson, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    paths = [next(finished.pictures.glob(f"{stem}.*")) for stem in ["3/000_1", "1/001_2", "1/000_3"]]
    names = [path.relative_to(finished.pictures).as_posix() for path in paths]
    pictures = lesson.PictureFolder(finished.pictures, names, {"1": 0, "3": 1})
    kept = lesson.load_into_memory(pictures, 0)
    assert isinstance(kept, TensorDataset) and kept.tensors[1].tolist() == [1, 0, 0]
    assert torch.equal(kept.tensors[0], torch.stack([pictures[i][0] for i in range(3)]))
    assert capsys.readouterr().out == "Pictures a second: 1 from files (0 workers), 6 from memory.\n"


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")  # no step of the optimizer is made here
def test_random_numbers_in_workers_can_be_repeated_and_are_not_alike(lesson, finished, monkeypatch):
    """A Dataset that draws with torch, random and NumPy, read through the loaders that train() makes."""
    loaders, original = [], lesson.DataLoader
    monkeypatch.setattr(lesson, "DataLoader", lambda *a, **k: loaders.append((a, k)) or original(*a, **k))
    args = lesson.parse_args(["--data", "digits", "--epochs", "1", "--device", "cpu", "--lazy", "--workers", "2",
                              "--batch-size", "4", "--output-dir", str(finished.folder / "again")])  # fmt: skip
    args.pictures = ""
    monkeypatch.setattr(lesson, "train_one_epoch", lambda *_: (1.0, 10.0))
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, 10.0))
    lesson.train(args, "arm", [0] * 8, [0] * 8, {"a": 0, "b": 1}, finished.folder / "again" / "run" / "arm")
    (_, options), _ = loaders
    assert options["num_workers"] == 2 and options["shuffle"]
    draws = []
    for _ in range(2):
        options["generator"].manual_seed(42)
        draws.append(torch.cat(list(original(Chance(), 4, **options))))
    assert torch.equal(*draws), "the same in both runs"
    assert all(len(set(column.tolist())) == 8 for column in draws[0].T), (
        "and another number for every picture"
    )


class Chance(torch.utils.data.Dataset):
    """Eight items, each a random number of torch, of Python and of NumPy."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([torch.rand(1).item(), random.random(), np.random.rand()])


def stop_in_epoch(lesson, monkeypatch, number):
    """Let the Nth call of train_one_epoch() be interrupted."""
    original, calls = lesson.train_one_epoch, []

    def stop(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(lesson, "train_one_epoch", stop)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(lesson, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume"):
        stop_in_epoch(lesson, patch, 4)  # the second epoch of the second split
        run_lesson(lesson, tmp_path, *FLAGS, "--epochs", 2)
    lesson.main(["--resume", "--output-dir", str(tmp_path), "--device", "cpu", "--lazy", "--workers", "0"])
    for arm in ["by_file", "by_group"]:
        for name in ["latest_checkpoint.pth", "best_model.pth"]:
            path = tmp_path / "artifacts" / "checkpoints" / NAME / "digits_run_1" / arm / name
            assert_same_state(load(path), load(finished.run / arm / name))


def test_own_pictures_of_two_classes_are_trained_and_predicted(lesson, tmp_path, capsys):
    folder = paint(tmp_path / "my pets", ["cat", "dog"], pictures=10)
    output = run_lesson(
        lesson, tmp_path / "out", "--images", folder, "--epochs", 3, "--batch-size", 4, "--workers", 0
    )
    run = tmp_path / "out" / "artifacts" / "checkpoints" / NAME / "my pets_run_1"
    assert [path.name for path in run.iterdir()] == ["by_group"] and "by_file" not in output
    assert "Device: cpu | data: my pets, 20 pictures\n" in output
    assert load(run / "by_group" / "best_model.pth")["class_to_idx"] == {"cat": 0, "dog": 1}
    lines = run_lesson(lesson, tmp_path / "out", "--predict", folder / "dog" / "3_1.png").splitlines()
    assert re.fullmatch(
        rf"{re.escape(str(folder / 'dog' / '3_1.png'))}: (cat|dog) [\d.]+ %, (cat|dog) [\d.]+ %", lines[0]
    )
    assert "2 classes" in lines[1] and str(run / "by_group" / "best_model.pth") in lines[1]


def test_predicting_a_folder_uses_the_models_labels_though_a_class_is_missing(lesson, finished, tmp_path):
    """Numbered anew, all classes after the missing one would be taken for their neighbours."""
    shutil.copytree(finished.pictures, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "2")
    best = max(finished.run.glob("*/best_model.pth"), key=lambda path: path.stat().st_mtime)
    before = checkpoints_of(lesson, finished.folder)
    output = run_lesson(lesson, finished.folder, "--predict", tmp_path / "part")
    assert checkpoints_of(lesson, finished.folder) == before and "Epoch" not in output
    files = [path for path in (tmp_path / "part").glob("*/0*") if path.parent.name + path.stem != "9004_4"]
    share = recognized(lesson, best, files, {str(i): i for i in range(10)})
    printed = re.search(r": ([\d.]+) % of 179 pictures are right", output)
    assert float(printed[1]) == pytest.approx(share, abs=0.006)
    (tmp_path / "part" / "tiger").mkdir()
    with pytest.raises(SystemExit, match=r"named after the classes: 0, 1, 2, .*, 9\."):
        run_lesson(lesson, finished.folder, "--predict", tmp_path / "part")


def test_a_picture_that_cannot_be_read_ends_predict_in_a_sentence(lesson, finished, tmp_path):
    (tmp_path / "no.png").write_text("no picture", encoding="utf-8")
    for name, reason in [("no.png", "convert HEIC"), ("none.png", "No such file")]:
        with pytest.raises(SystemExit, match=f"^Cannot read .*{name} as a picture.*{reason}"):
            run_lesson(lesson, finished.folder, "--predict", tmp_path / name)


@pytest.mark.parametrize("change", ["class missing", "picture more", "class renamed"])
def test_a_run_does_not_go_on_with_other_pictures(lesson, finished, tmp_path, change):
    """The indices of the classes and the split would be others."""
    shutil.copytree(finished.folder / "artifacts", tmp_path / "artifacts")
    folder = tmp_path / "artifacts" / NAME / finished.pictures.name
    if change == "class missing":
        shutil.rmtree(folder / "2")
    elif change == "picture more":
        Image.new("RGB", (40, 40), "red").save(folder / "2" / "new.png")
    else:
        (folder / "2").rename(folder / "two")
    sentence = "named after the classes: 0, 1, 2" if change == "class renamed" else "Train anew"
    before = checkpoints_of(lesson, tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        lesson.main(["--resume", "--output-dir", str(tmp_path), "--device", "cpu"])
    assert checkpoints_of(lesson, tmp_path) == before


def test_flags_that_make_no_sense_are_refused(lesson, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        lesson.main(["--workers", "-1", "--device", "cpu"])
    assert error.value.code == 2 and "--workers" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(FileNotFoundError, match="none"):  # printed at the end of the lesson, in a sentence
        run_lesson(lesson, tmp_path, "--images", tmp_path / "none")
    assert not list(tmp_path.iterdir())
