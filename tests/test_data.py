"""Where the images come from, what they look like, and how they are split.

load_data() and split_train_val() have one text in all lessons (test_sync.py), so they are tested in one of them.
"""

import hashlib
import io
import pickle
import socket
import tarfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAME = "cifar-10-python.tar.gz"
NO_SERVER = f"http://127.0.0.1:9/{NAME}"  # nothing listens on this port


@pytest.fixture(scope="module")
def archive():
    """A small CIFAR-10 in the official layout, 10 random images in each of 6 files: .tar.gz, MD5 sums, contents."""
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {
        name: {"data": random.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        for name in names
    }
    files["batches.meta"] = {"label_names": CLASSES}
    content, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, file in files.items():
            data = pickle.dumps(file)
            sums[name] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue(), sums, files


class Mirror(BaseHTTPRequestHandler):
    """Serves the archive at /good/, half of it at /half/, another file at /wrong/, and at /silent/ nothing."""

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
def load_data(lessons, monkeypatch):
    """load_data() of a lesson, which knows no mirror and no proxy, and waits a tenth as long for an answer."""
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies
    monkeypatch.setattr(lessons["01"], "MIRRORS", [NO_SERVER])
    monkeypatch.setattr(lessons["01"].CIFAR10, "url", NO_SERVER)
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 10))
    yield lessons["01"].load_data
    set_timeout(None)


@pytest.fixture
def mirror(lessons, load_data, archive, monkeypatch):
    """A server with a small CIFAR-10, which passes for the real one, and a function that sets MIRRORS."""
    content, sums, _ = archive
    cifar10 = lessons["01"].CIFAR10
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(content).hexdigest())
    batches = [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    monkeypatch.setattr(cifar10, "train_list", batches)
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(Mirror, "content", content)
    monkeypatch.setattr(Mirror, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.stopping = threading.Event()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def set_mirrors(*pages):
        urls = [NO_SERVER if page == "dead" else f"{address}/{page}/{NAME}" for page in pages]
        monkeypatch.setattr(lessons["01"], "MIRRORS", urls)

    yield set_mirrors
    server.stopping.set()
    server.shutdown()
    server.server_close()


def test_cifar10_images_are_those_of_the_files(mirror, load_data, archive, tmp_path):
    """uint8 (N, 3, 32, 32), red, green and blue in their places, upright, in the order of the files."""
    mirror("good")
    images, labels, class_names, data = load_data("auto", tmp_path, train=True)
    assert images.dtype == torch.uint8 and images.shape == (50, 3, 32, 32) and labels.dtype == torch.int64
    files = archive[2]
    pixels = np.concatenate([files[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    assert np.array_equal(images.numpy(), pixels.reshape(-1, 3, 32, 32)) and images.is_contiguous()
    assert labels.tolist() == list(range(10)) * 5 and class_names == CLASSES and data == "cifar10"
    images, labels, *_ = load_data("cifar10", tmp_path, train=False)
    assert np.array_equal(images.numpy(), files["test_batch"]["data"].reshape(-1, 3, 32, 32))
    assert labels.tolist() == list(range(10))


def test_mirrors_that_are_dead_silent_or_wrong_are_passed_over(mirror, load_data, tmp_path, capsys):
    """Each is named, the next one is asked, and what was downloaded once is not downloaded again.

    A silent one is given up after 15 seconds, which are 1.5 here.
    """
    mirror("dead", "silent", "wrong", "good")
    assert load_data("auto", tmp_path / "new", train=True)[3] == "cifar10"
    assert capsys.readouterr().out.count("No CIFAR-10 from 127.0.0.1") == 3
    assert socket.getdefaulttimeout() == 1.5
    requests = len(Mirror.requests)
    assert len(load_data("cifar10", tmp_path / "new", train=False)[0]) == 10
    assert len(Mirror.requests) == requests


@pytest.mark.parametrize("state", ["half an archive", "a folder without files", "a cut batch file"])
def test_what_an_earlier_run_left_half_done_does_no_harm(mirror, load_data, archive, tmp_path, state):
    """Without network it is not used, and with network, even with a bad one, it is replaced."""
    folder = tmp_path / "cifar-10-batches-py"
    if state == "half an archive":
        (tmp_path / NAME).write_bytes(archive[0][:5000])
    else:
        folder.mkdir()
    if state == "a cut batch file":
        for name, content in archive[2].items():
            (folder / name).write_bytes(pickle.dumps(content)[: 1000 if name == "data_batch_3" else None])
    assert load_data("auto", tmp_path, train=True)[3] == "digits"
    mirror("half", "good")
    images, *_, data = load_data("auto", tmp_path, train=True)
    assert data == "cifar10" and len(images) == 50


def test_an_archive_put_there_by_hand_needs_no_network(mirror, load_data, archive, tmp_path):
    """Neither at the first start, nor when an unpacked file has been damaged since."""
    mirror("dead")
    (tmp_path / NAME).write_bytes(archive[0])
    images, *_, data = load_data("cifar10", tmp_path, train=True)
    assert data == "cifar10" and len(images) == 50
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    assert torch.equal(load_data("cifar10", tmp_path, train=True)[0], images)


def test_without_network_digits_take_over_with_a_notice(load_data, tmp_path, capsys):
    """The notice says what to do for CIFAR-10. If that was asked for, nothing takes its place, and the lesson ends."""
    assert load_data("auto", tmp_path, train=True)[3] == "digits"
    output = capsys.readouterr().out
    assert "Continuing with handwritten digits instead." in output and f"put {NAME} into {tmp_path}" in output
    with pytest.raises(SystemExit, match=r"^CIFAR-10 is not available\. Put .* by hand\.$") as error:
        load_data("cifar10", tmp_path, train=True)
    assert str(tmp_path) in error.value.code


def test_a_proxy_variable_that_is_no_url_counts_as_no_network(mirror, load_data, monkeypatch, tmp_path):
    """urllib raises an HTTPException of its own kind for it, which is no OSError."""
    mirror("good")
    monkeypatch.setenv("http_proxy", "http://proxy:port")
    assert load_data("auto", tmp_path, train=True)[3] == "digits" and not Mirror.requests


def test_an_unwritable_data_dir_is_not_reported_as_missing_network(mirror, load_data, tmp_path, capsys):
    """The system's own error names the cause, here a file in the way, and no other mirror is asked."""
    mirror("good", "other")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        load_data("auto", tmp_path / "file" / "data", train=True)
    assert "No CIFAR-10" not in capsys.readouterr().out and not Mirror.requests


def test_digits_are_two_disjoint_splits_of_all_1797_images(load_data, tmp_path):
    """Every fifth image is a test image. Nothing is asked of the network."""
    digits = load_digits()
    numbers, test = np.arange(1797), np.arange(1797) % 5 == 4
    for train, chosen in [(True, numbers[~test]), (False, numbers[test])]:
        images, labels, class_names, data = load_data("digits", tmp_path / "none", train=train)
        assert images.dtype == torch.uint8 and images.shape == (len(chosen), 3, 32, 32)
        assert labels.dtype == torch.int64 and labels.tolist() == digits.target[chosen].tolist()
        small = images[:, 1, ::4, ::4].numpy()
        assert np.abs(small / 255 * 16 - digits.images[chosen]).max() < 0.1, "upright, and not mirrored"
        enlarged = small.repeat(4, axis=1).repeat(4, axis=2)
        assert all(np.array_equal(images[:, channel].numpy(), enlarged) for channel in range(3))
        assert class_names == list("0123456789") and data == "digits"
    assert not (tmp_path / "none").exists()


def test_validation_split_is_disjoint_complete_and_seeded(lessons):
    """80 % and 20 %, shuffled by the seed alone; labels stay with their images; a subset is the beginning of each."""
    split = lessons["02"].split_train_val
    numbers = torch.arange(50_003)  # every image is its own number, and the split is uneven

    def draw(seed, subset):
        parts = split(numbers.view(-1, 1, 1, 1), numbers, seed, subset)
        assert all(torch.equal(part.tensors[0].flatten(), part.tensors[1]) for part in parts)
        return [part.tensors[1].tolist() for part in parts]

    train, val = draw(42, 50_003)
    assert (len(train), len(val)) == (40_002, 10_001) and sorted(train + val) == numbers.tolist()
    assert train != sorted(train) and val != sorted(val)
    torch.rand(1)  # other random numbers make no difference
    assert draw(42, 50_003) == [train, val] and draw(43, 50_003)[1] != val
    assert draw(42, 100) == [train[:100], val[:100]]
