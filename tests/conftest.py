"""What the tests share: the lessons as modules, and one quick run of each on scikit-learn's handwritten digits."""

import argparse
import contextlib
import functools
import io
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

# Threads that wait leave the cores to the other processes, of which the tests start many.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import sklearn.datasets
import torch
from common import LESSONS, load_lesson
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)  # hundreds of tests read them
ROOT = Path(__file__).resolve().parents[1]
PATHS = {path.stem[:2]: path for path in sorted(LESSONS.glob("[01]*.py"))}
NUMBERS = list(PATHS)  # "01", "02", ...
CORE = NUMBERS[:6]  # they share the loop of train(); each of the others has tests of its own loop
DRAW = {Figure: "savefig", SummaryWriter: "add_figure"}  # what takes long, and few tests look at
ORIGINALS = {kind: getattr(kind, name) for kind, name in DRAW.items()}
CPU = torch.device("cpu")
JOBS = {}  # {name: function}, of in_background()
UNIX = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of Linux and macOS")
QUICK = ["--data", "digits", "--epochs", "1", "--subset", "256", "--device", "cpu"]
IMAGES = {"07": 64, "09": 64}  # 16 bits take long on some computers, and 48 runs on all; else 256
TINY = {number: ["--subset", "32"] for number in NUMBERS}
TINY["09"] = ["--subset", "48", "--batch-size", "16"]  # it needs three batches
TINY["10"] = ["--subset", "100", "--labels", "4", "--steps", "2"]  # it needs some images of each class
TINY["11"] = ["--subset", "120", "--workers", "0"]


def run_lesson(lesson, output_dir, *flags):
    """Run main() of a lesson on 256 digits for one epoch, unless the flags say otherwise. Returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output, no_group_left():
        lesson.main([*QUICK, "--output-dir", str(output_dir), *map(str, flags)])
        assert not torch.distributed.is_initialized(), "lesson 12 takes leave of its group"
    return output.getvalue()


@contextlib.contextmanager
def no_group_left():
    """Lesson 12's main() joins a group of processes, here of one; if it fails, the group is there for the next one."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def load_quick_lesson(number):
    """Import a lesson from its file. Lesson 10 tries one learning rate here, and lesson 09 three dangers."""
    lesson = load_lesson(number)
    if number == "09":
        chosen = ["none", "images of nan", "BatchNorm, lr x 6"]
        lesson.DANGERS = {danger: lesson.DANGERS[danger] for danger in chosen}
    if number == "10":
        lesson.LEARNING_RATES = [0.02]
    return lesson


def resume(lesson, output_dir, *flags):
    """Run main() with --resume and without any setting, so that the checkpoint's stand. Returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        lesson.main(["--resume", "--device", "cpu", "--output-dir", str(output_dir), *map(str, flags)])
    return output.getvalue()


def stop_in_epoch(patch, lesson, number):
    """Press Ctrl-C when a lesson has trained its Nth epoch (counted over all its variants), and saved one less."""
    count, log_epoch = itertools.count(1), lesson.log_epoch

    def stop_or_log(*args):
        if next(count) == number:
            raise KeyboardInterrupt
        log_epoch(*args)

    patch.setattr(lesson, "log_epoch", stop_or_log)


def use_results(patch, lesson, train, val=()):
    """Train nothing: let the epochs of a lesson return these pairs of a loss and an accuracy, in this order."""
    train, val = iter(train), iter(val)

    def train_one_epoch(model, loader, loss_fn, optimizer, *_):
        optimizer.step()  # which the schedulers expect; without gradients it changes nothing
        return next(train)

    patch.setattr(lesson, "train_one_epoch", train_one_epoch)
    patch.setattr(lesson, "evaluate", lambda *_: next(val), raising=False)  # lesson 01 has none


def draw_nothing(patch, lessons):
    """Let these lessons draw nothing, which is most of the time of a short run. Their pictures are empty files."""
    patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
    patch.setattr(SummaryWriter, "add_figure", lambda *_: None)
    for lesson in lessons:
        for name in [name for name in vars(lesson) if name.startswith("plot_")]:
            patch.setattr(lesson, name, lambda *_: Figure())


def folder_of(lesson, output_dir):
    """Return the folder in which a lesson keeps its checkpoints."""
    return output_dir / "artifacts" / "checkpoints" / lesson.LESSON


def checkpoints_of(lesson, output_dir):
    """Return all checkpoints in folder_of() as {path relative to its folder: content of the file}."""
    folder = folder_of(lesson, output_dir)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.pth"))}


def flatten(model):
    """Return a copy of the parameters as one vector."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def contents(folder):
    """Return all files below a folder, {path: content}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parser_of(lesson):
    """Return the parser that a lesson's parse_args() makes."""
    made = []

    def keep(parser, *_):
        made.append(parser)
        raise SystemExit  # what follows in parse_args() wants its result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        lesson.parse_args([])
    return made[0]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_state(one, other):
    """Compare nested dicts, lists and tensors bit for bit, but for what a clock writes."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"Seconds", "ImagesPerSecond", "run"}:
            assert_same_state(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same_state(first, second)
    else:
        assert one == other


def in_background(job):
    """Make a fixture of a function that starts processes in a folder and waits for them. It returns what that returns.

    To import PyTorch takes each process some seconds, so they run from the beginning on, beside the tests.
    """
    JOBS[job.__name__] = job

    @pytest.fixture(scope="session", name=job.__name__)
    def result(background):
        return background[job.__name__].result()

    return result


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """Run the jobs that the chosen tests need, one after the other. Tests that are skipped on this system need none."""
    tests = [
        test
        for test in request.session.items
        if not any(mark.args[0] for mark in test.iter_markers("skipif"))
    ]
    needed = {name for test in tests for name in test.fixturenames}
    pool = ThreadPoolExecutor(max_workers=1)
    yield {
        name: pool.submit(job, tmp_path_factory.mktemp(name)) for name, job in JOBS.items() if name in needed
    }
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def lessons():
    """The lessons as modules, by number: "01", "02", ..."""
    return {number: load_quick_lesson(number) for number in NUMBERS}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A function that returns one quick run of a lesson on a device, which all tests share: its folder and output."""

    @functools.cache
    def run(number, device):
        folder = tmp_path_factory.mktemp(f"lesson {number} on {device}")  # with spaces, which some paths have
        with pytest.MonkeyPatch.context() as patch:
            for kind, name in DRAW.items():
                patch.setattr(kind, name, ORIGINALS[kind])  # this run has pictures, whoever asks for it first
            lesson = load_quick_lesson(number)  # a module of its own, in which no test has patched anything
            epochs = 2 if number in CORE else 1
            flags = ["--device", device, "--subset", IMAGES.get(number, 256), "--epochs", epochs]
            flags += {"09": TINY["09"], "10": TINY["10"], "11": TINY["11"]}.get(number, [])
            output = run_lesson(lesson, folder, *flags)
        return SimpleNamespace(folder=folder, output=output, artifacts=folder / "artifacts")

    return lambda number, device="cpu": run(number, device)  # so that both ways to ask for the CPU are one


@pytest.fixture
def no_pictures(monkeypatch, lessons):
    """For tests of other things: nothing is drawn, and pictures are empty files."""
    draw_nothing(monkeypatch, lessons.values())


@pytest.fixture
def seconds(monkeypatch):
    """For tests that start a lesson twice at once: every start falls into another second, which names its run."""
    count = itertools.count(1)
    monkeypatch.setattr(time, "strftime", lambda *_: f"20250101-{next(count):06d}")


@pytest.fixture
def images():
    """20 random images with labels, so that batches of 8 leave a last one of 4."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 10, (20,), generator=generator))


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request):
    """The CPU and, where there is one, the GPU."""
    return request.param
