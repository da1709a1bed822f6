"""Where the images come from and how they are split, in the lessons that have the older form (07 to 12)."""

import ast
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
from conftest import PATHS

NUMBERS = ["07", "08", "09", "10", "11", "12"]
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
    lesson = lessons["12"]
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
    lesson = lessons["12"]
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
    for lesson in [lessons[number] for number in NUMBERS]:
        assert len(lesson.MIRRORS) >= 3 and "cs.toronto.edu" in lesson.MIRRORS[-1]
        assert all(url.endswith("/cifar-10-python.tar.gz") for url in lesson.MIRRORS)


def test_digits_are_two_disjoint_splits_of_all_1797_images(lessons, tmp_path):
    load = lessons["12"].load_data
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


@pytest.mark.parametrize("number", ["07", "08", "09", "10", "12"])
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
    train, val = lessons["12"].split_train_val(torch.zeros(11, 1, 1, 1), torch.arange(11), 0, None)
    assert sorted([*train.tensors[1].tolist(), *val.tensors[1].tolist()]) == list(range(11))


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
    for lesson in [lessons[number] for number in NUMBERS]:
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


SHARED = {
    "load_data to_input to_device new_run_dirs": NUMBERS,
    "split_train_val": ["07", "08", "09", "10", "12"],
    "SimpleCNN save_checkpoint load_checkpoint stop_if_diverged": ["07", "08", "10", "11", "12"],
    "find_newest": ["07", "08", "11", "12"],
    "report_epoch": ["07", "08", "10", "11"],
    "evaluate": ["08", "09", "10", "11"],
    "train_one_epoch": ["08", "10", "11"],
    "resume_hint": ["07", "08", "11"],
}


@pytest.mark.parametrize("names", SHARED)
def test_what_lessons_share_is_one_text(names):
    """So a test of it in one of them holds for the others, too."""
    for name in names.split():
        texts = set()
        for number in SHARED[names]:
            source = PATHS[number].read_text(encoding="utf-8")
            [node] = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
            texts.add(ast.get_source_segment(source, node))
        assert len(texts) == 1, name
