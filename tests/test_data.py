"""Where the images come from, how they are split, and how they are changed."""

import hashlib
import io
import pickle
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, run_lesson
from torchvision.transforms import v2

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NO_SERVER = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # nothing listens on this port


def make_archive():
    """Return a .tar.gz in the official layout, with 10 random images in each of 6 files, and the files' MD5 sums."""
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {
        name: {"data": random.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        for name in names
    }
    files["batches.meta"] = {"label_names": CLASSES}
    archive, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            data = pickle.dumps(content)
            sums[name] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue(), sums, files


@pytest.fixture(scope="module")
def archive():
    return make_archive()


class Mirror(BaseHTTPRequestHandler):
    """Serves the archive at /good/, something else at /wrong/, and for a long time nothing at /silent/.

    At /half/ it sends the first half of the archive and no more.
    """

    content, requests = b"", []

    def do_GET(self):
        Mirror.requests.append(self.path)
        if self.path.startswith("/silent/"):
            self.server.stopping.wait(20)
            return
        body = b"this is no archive" if self.path.startswith("/wrong/") else Mirror.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path.startswith("/half/") else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def cifar10(lessons, archive, monkeypatch):
    """A local mirror of a small CIFAR-10. Returns the lesson whose load_data() is tried, and the mirror's address."""
    content, sums, _ = archive
    lesson = lessons["01"]
    monkeypatch.setattr(lesson.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(
        lesson.CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(lesson.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(lesson.CIFAR10, "meta", {**lesson.CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(lesson.CIFAR10, "url", NO_SERVER)  # torchvision is to download nothing by itself
    monkeypatch.setattr(Mirror, "content", content)
    monkeypatch.setattr(Mirror, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.stopping = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lesson, f"http://127.0.0.1:{server.server_port}"
    server.stopping.set()
    server.shutdown()
    server.server_close()


def test_a_dead_and_a_wrong_mirror_are_passed_over(cifar10, archive, monkeypatch, tmp_path, capsys):
    lesson, address = cifar10
    name = "cifar-10-python.tar.gz"
    monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER, f"{address}/wrong/{name}", f"{address}/good/{name}"])
    images, labels, class_names, data_name = lesson.load_data("auto", tmp_path / "new", train=True)
    assert data_name == "cifar10" and class_names == CLASSES
    assert images.shape == (50, 32, 32, 3) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    files = archive[2]
    first = files["data_batch_1"]["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(images[3].numpy(), first), "red, green and blue in their places"
    assert labels.tolist() == list(range(10)) * 5
    assert capsys.readouterr().out.count("no CIFAR-10 from") == 2
    requests = len(Mirror.requests)
    images, *_ = lesson.load_data("cifar10", tmp_path / "new", train=False)
    assert len(images) == 10 and np.array_equal(
        images[9].numpy(), files["test_batch"]["data"][9].reshape(3, 32, 32).transpose(1, 2, 0)
    )
    assert len(Mirror.requests) == requests, "what is there is not downloaded again"


def test_a_silent_mirror_is_given_up(cifar10, monkeypatch, tmp_path):
    """After the 15 seconds that the lesson sets for every connection: here they are half a second."""
    lesson, address = cifar10
    name = "cifar-10-python.tar.gz"
    asked, set_timeout = [], socket.setdefaulttimeout
    monkeypatch.setattr(
        socket, "setdefaulttimeout", lambda seconds: (asked.append(seconds), set_timeout(0.5))
    )
    monkeypatch.setattr(lesson, "MIRRORS", [f"{address}/silent/{name}", f"{address}/good/{name}"])
    try:
        *_, data_name = lesson.load_data("auto", tmp_path, train=True)
    finally:
        set_timeout(None)
    assert data_name == "cifar10" and asked == [15]
    assert any("/silent/" in path for path in Mirror.requests)


@pytest.mark.parametrize(
    "state", ["half an archive", "another archive", "an empty archive", "a folder without files"]
)
def test_what_an_earlier_run_left_half_done_does_no_harm(cifar10, archive, monkeypatch, tmp_path, state):
    lesson, address = cifar10
    file = tmp_path / "cifar-10-python.tar.gz"
    if state == "a folder without files":
        (tmp_path / "cifar-10-batches-py").mkdir()
    else:
        contents = {
            "half an archive": archive[0][:5000],
            "another archive": archive[0][::-1],
            "an empty archive": b"",
        }
        file.write_bytes(contents[state])
    monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER])
    assert lesson.load_data("auto", tmp_path, train=True)[3] == "digits"
    monkeypatch.setattr(lesson, "MIRRORS", [f"{address}/half/{file.name}", f"{address}/good/{file.name}"])
    images, *_, data_name = lesson.load_data("auto", tmp_path, train=True)
    assert data_name == "cifar10" and len(images) == 50


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_batch_file_is_unpacked_again(cifar10, archive, monkeypatch, tmp_path, damage):
    lesson, _ = cifar10
    monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER])
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[0])
    before = lesson.load_data("cifar10", tmp_path, train=True)[0]
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:1000] if damage == "cut" else content[:-1] + b"!")
    assert torch.equal(lesson.load_data("cifar10", tmp_path, train=True)[0], before)
    file.unlink()
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(SystemExit, match="CIFAR-10 is not in"):
        lesson.load_data("cifar10", tmp_path, train=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_not_the_mirrors_fault(cifar10, monkeypatch, tmp_path):
    lesson, address = cifar10
    (tmp_path / "cifar-10-python.tar.gz").symlink_to("/dev/full")
    monkeypatch.setattr(
        lesson, "MIRRORS", [f"{address}/{i}/cifar-10-python.tar.gz" for i in ["good", "other"]]
    )
    with pytest.raises(OSError, match="No space left"):
        lesson.load_data("auto", tmp_path, train=True)
    assert not any("/other/" in path for path in Mirror.requests), "it is not downloaded a second time"


def test_an_archive_put_there_by_hand_needs_no_network(cifar10, archive, monkeypatch, tmp_path):
    lesson, _ = cifar10
    monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER])
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[0])
    images, *_, data_name = lesson.load_data("cifar10", tmp_path, train=True)
    assert data_name == "cifar10" and len(images) == 50


def test_without_network_digits_take_over_with_a_notice(lessons, monkeypatch, tmp_path, capsys):
    lesson = lessons["01"]
    monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER])
    *_, data_name = lesson.load_data("auto", tmp_path, train=True)
    output = capsys.readouterr().out
    assert (
        data_name == "digits"
        and "handwritten digits instead" in output
        and "cifar-10-python.tar.gz" in output
    )
    with pytest.raises(SystemExit, match="CIFAR-10 is not in"):
        lesson.load_data("cifar10", tmp_path, train=True)


def test_the_official_server_is_asked_last(lessons):
    for lesson in lessons.values():
        assert len(lesson.MIRRORS) >= 3 and "cs.toronto.edu" in lesson.MIRRORS[-1]
        assert all(url.endswith("/cifar-10-python.tar.gz") for url in lesson.MIRRORS)


def test_digits_are_two_disjoint_splits_of_all_1797_images(lessons, tmp_path):
    load = lessons["01"].load_data
    train, train_labels, class_names, _ = load("digits", tmp_path, train=True)
    test, test_labels, *_ = load("digits", tmp_path, train=False)
    assert len(train) == 1438 and len(test) == 359 and class_names == list("0123456789")
    assert train.shape[1:] == (32, 32, 3) and train.dtype == torch.uint8 and train.max() == 255
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert np.allclose(train[0, ::4, ::4, 1] / 255 * 16, digits.images[0], atol=0.1)
    assert torch.equal(train[..., 0], train[..., 2])
    assert np.array_equal(test_labels, digits.target[4::5])
    assert sorted([*train_labels.tolist(), *test_labels.tolist()]) == sorted(digits.target.tolist())


@pytest.mark.parametrize("number", ["02", "03", "04", "05", "06"])
def test_validation_split_is_disjoint_complete_and_seeded(lessons, number):
    split = lessons[number].split_train_val
    images = torch.arange(50_000, dtype=torch.int32).view(-1, 1, 1, 1)  # every image is its own number
    labels = torch.arange(50_000)
    train, val = split(images, labels, 42, None)
    assert len(train) == 40_000 and len(val) == 10_000
    train_numbers, val_numbers = train.tensors[1].tolist(), val.tensors[1].tolist()
    assert sorted(train_numbers + val_numbers) == list(range(50_000))
    assert torch.equal(train.tensors[0].flatten(), train.tensors[1].int()), "labels stay with their images"
    assert train_numbers != sorted(train_numbers), "shuffled"
    torch.rand(1)  # what else is drawn does not matter
    assert split(images, labels, 42, None)[1].tensors[1].tolist() == val_numbers
    assert split(images, labels, 43, None)[1].tensors[1].tolist() != val_numbers
    small_train, small_val = split(images, labels, 42, 100)
    assert small_train.tensors[1].tolist() == train_numbers[:100]
    assert small_val.tensors[1].tolist() == val_numbers[:100]


def test_uneven_split_loses_no_image(lessons):
    train, val = lessons["02"].split_train_val(torch.zeros(11, 1, 1, 1), torch.arange(11), 0, None)
    assert sorted([*train.tensors[1].tolist(), *val.tensors[1].tolist()]) == list(range(11))


# Augmentation


@pytest.fixture
def photos():
    """64 images uint8 (64, 32, 32, 3), all the same picture without any symmetry."""
    picture = torch.randint(
        60, 200, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    return picture.repeat(64, 1, 1, 1)


def test_augmented_images_keep_shape_type_and_order(lessons, photos):
    marked = photos.clone()
    marked[:, :, :, 0] = (
        torch.arange(64, dtype=torch.uint8).view(-1, 1, 1) * 3
    )  # a shade of red for every image
    torch.manual_seed(0)
    result = lessons["05"].make_augmentation("cifar10", 16)(marked)
    assert result.shape == marked.shape and result.dtype == torch.uint8
    shades = [result[i, :, :, 0].median().item() for i in range(64)]
    assert np.corrcoef(shades, range(64))[0, 1] > 0.9


def test_groups_share_their_random_numbers_and_differ_from_each_other(lessons, photos):
    torch.manual_seed(0)
    result = lessons["05"].make_augmentation("cifar10", 16)(photos)
    groups = result.split(16)
    # RandomErasing may fill a patch, at one place for the group; all else is the same for its images as well.
    assert all(torch.equal(group[0], image) for group in groups for image in group)
    assert len({group[0].numpy().tobytes() for group in groups}) == 4
    single = lessons["05"].make_augmentation("cifar10", 1)(photos)
    assert len({image.numpy().tobytes() for image in single}) > 60


@pytest.mark.parametrize("number", ["05", "06"])
def test_photographs_are_mirrored_and_digits_never(lessons, photos, number):
    """With all other transforms switched off, half of the groups come out mirrored left and right, or none."""
    lesson, mirrored = lessons[number], photos.flip(2)
    nothing_else = [lesson.AUGMENTATION[0], *([torch.nn.Identity()] * (len(lesson.AUGMENTATION) - 1))]
    for data, expected in [("cifar10", range(10, 55)), ("digits", [0])]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lesson, "AUGMENTATION", nothing_else)
            torch.manual_seed(0)
            result = lesson.make_augmentation(data, 1)(photos)
        count = sum(torch.equal(image, other) for image, other in zip(result, mirrored, strict=True))
        same = sum(torch.equal(image, other) for image, other in zip(result, photos, strict=True))
        assert count in expected and count + same == 64


def test_the_list_of_transforms_is_the_promised_one(lessons):
    for number in ["05", "06"]:
        flip, crop, rotation, jitter, erasing = lessons[number].AUGMENTATION
        assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
        assert isinstance(crop, v2.RandomCrop) and crop.size == (32, 32) and list(crop.padding) == [2] * 4
        assert rotation.p == 0.5 and isinstance(rotation.transforms[0], v2.RandomRotation)
        assert list(rotation.transforms[0].degrees) == [-15, 15]
        assert (
            jitter.p == 0.3 and isinstance(jitter.transforms[0], v2.ColorJitter) and jitter.transforms[0].hue
        )
        assert isinstance(erasing, v2.RandomErasing) and erasing.p == 0.3 and max(erasing.scale) == 0.15


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["05", "06"])
def test_training_images_change_every_epoch_and_validation_images_never(
    lessons, tmp_path, monkeypatch, number
):
    """As the network sees them while main() runs: the arm without augmentation first, then those with it."""
    lesson, seen, forward = lessons[number], [], lessons[number].SimpleCNN.forward

    def spy(self, x):
        seen.append((self.training, self.dropout.p, x.clone()))
        return forward(self, x)

    monkeypatch.setattr(lesson.SimpleCNN, "forward", spy)
    run_lesson(lesson, tmp_path, "--epochs", 2, "--subset", 64, "--batch-size", 64)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    train, val = lesson.split_train_val(images, labels, 42, 64)
    plain = {mode: lesson.to_input(part.tensors[0], CPU) for mode, part in [(True, train), (False, val)]}

    def as_a_set(inputs):
        return {image.numpy().tobytes() for image in inputs}

    training = [inputs for mode, _, inputs in seen if mode]
    for mode, _, inputs in seen:
        if not mode and number == "05":  # lesson 06 looks at test images, too
            assert as_a_set(inputs) <= as_a_set(plain[False]) | as_a_set(plain[True])
    assert as_a_set(seen[1][2]) == as_a_set(plain[False])
    if number == "05":
        assert [p for mode, p, _ in seen if mode] == [0.0] * 4 + [0.5] * 2
        assert as_a_set(training[0]) == as_a_set(training[1]) == as_a_set(plain[True]), "the arm without"
        training = training[2:]
    for first, second in zip(training[::2], training[1::2], strict=True):
        assert not as_a_set(first) & as_a_set(second), "other random numbers in the second epoch"
        assert len(as_a_set(first) & as_a_set(plain[True])) < 32


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("number", "expected"), [("05", 2), ("06", 1)])
def test_05_and_06_augment_by_their_data_and_group_size(lessons, tmp_path, monkeypatch, number, expected):
    lesson, calls = lessons[number], []
    make = lesson.make_augmentation
    monkeypatch.setattr(lesson, "make_augmentation", lambda *args: (calls.append(args), make(*args))[1])
    run_lesson(lesson, tmp_path, "--subset", 32, "--group-size", 8)
    assert calls == [("digits", 8)] * expected


def test_the_folder_of_the_unpacked_files_can_be_named_itself(cifar10, archive, monkeypatch, tmp_path):
    lesson, _ = cifar10
    monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER])
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[0])
    expected = lesson.load_data("cifar10", tmp_path, train=True)[0]
    inner = tmp_path / "cifar-10-batches-py"
    assert torch.equal(lesson.load_data("cifar10", inner, train=True)[0], expected)
    assert not (inner / "cifar-10-batches-py").exists()


@pytest.mark.parametrize("name", ["cifar-10-python.tar", "cifar-10-python (1).tar.gz", "cifar-10-python"])
def test_an_archive_of_another_name_is_named(lessons, monkeypatch, tmp_path, name):
    """Neither downloaded again nor passed over for digits. The right archive, or the files, beside it will do."""
    for lesson in lessons.values():
        monkeypatch.setattr(lesson, "MIRRORS", [NO_SERVER])
        (tmp_path / name).touch()
        with pytest.raises(SystemExit) as error:
            lesson.load_data("auto", tmp_path, train=True)
        assert str(tmp_path / name) in error.value.code and "tar -xf" in error.value.code
        for right in ["cifar-10-batches-py", "cifar-10-python.tar.gz"]:
            (tmp_path / right).touch()
            with pytest.raises((SystemExit, OSError)) as error:
                lesson.load_data("cifar10", tmp_path, train=True)
            assert "tar -xf" not in str(error.value)
            (tmp_path / right).unlink()
