"""What can go wrong while a lesson runs: nothing is lost, and one clear sentence says what to do."""

import contextlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from common import read_scalars
from conftest import FLAGS, NUMBERS, PATHS, assert_same_state, folder_of, load, run_lesson
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of Linux and macOS")

# Numbers


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_learning_rate_out_of_all_reason_ends_the_lesson(lessons, tmp_path, number):
    with pytest.raises(SystemExit, match=r"^Epoch \d+, .+: the loss is (nan|inf), .* --lr is too high"):
        run_lesson(lessons[number], tmp_path, "--lr", 1e9, "--epochs", 3, "--batch-size", 16)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("number", NUMBERS)
def test_nan_is_noticed_within_20_batches(lessons, number):
    batches = []

    def loss_fn(logits, labels):
        batches.append(labels)
        return nn.functional.cross_entropy(logits, labels) * (float("nan") if len(batches) == 3 else 1)

    model = lessons[number].SimpleCNN()
    loader = DataLoader(
        TensorDataset(torch.zeros(60, 32, 32, 3, dtype=torch.uint8), torch.zeros(60).long()), 2
    )
    with pytest.raises(SystemExit, match="^Epoch 7, batch 20: the loss is nan"):
        lessons[number].train_one_epoch(model, loader, loss_fn, torch.optim.SGD(model.parameters()), "cpu", 7)
    assert len(batches) == 20


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["03", "04", "05"])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_bad_loss_is_never_saved(finished, lessons, tmp_path, monkeypatch, number, loss):
    """Neither over the latest checkpoint nor over the best model, even if the accuracy seems to be better."""
    lesson = lessons[number]
    shutil.copytree(finished(number).folder, tmp_path, dirs_exist_ok=True)
    latest = folder_of(lesson, tmp_path) / "latest_checkpoint.pth"
    if number != "03":  # go on with the last arm as if one more epoch were to be trained
        checkpoint = load(latest)
        checkpoint["hyperparameters"]["epochs"] = 2
        lesson.save_checkpoint(checkpoint, latest)
    before = {path.name: path.read_bytes() for path in latest.parent.iterdir()}
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (loss, 100.0))
    with pytest.raises(SystemExit, match="^Epoch 2, validation: the loss is"):
        run_lesson(lesson, tmp_path, "--epochs", 2, "--resume")
    assert {path.name: path.read_bytes() for path in latest.parent.iterdir()} == before


# Checkpoints


def test_damage_anywhere_in_a_checkpoint_is_noticed(finished, lessons, tmp_path):
    """Cut off at 20 places, and with one bit changed at 60: refused, unless the weights are the same all the same."""
    lesson, place = lessons["03"], random.Random(0)
    content = (finished("03").artifacts / "checkpoints" / lesson.LESSON / "best_model.pth").read_bytes()
    weights = load(io.BytesIO(content))["model"]
    path, refused = tmp_path / "x.pth", 0
    damaged = [content[: len(content) * i // 20] for i in range(20)]
    for _ in range(60):
        position, bit = place.randrange(len(content)), 1 << place.randrange(8)
        damaged.append(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
    for damage in damaged:
        path.write_bytes(damage)
        try:
            _, model = lesson.load_checkpoint(path)
        except SystemExit as error:
            assert str(error.code).startswith(f"{path} is damaged, or no checkpoint") and "\n" not in str(
                error.code
            )
            refused += 1
        else:
            assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert refused >= 70


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_resume_names_the_newest_file_that_can_be_read(finished, lessons, tmp_path, number):
    lesson = lessons[number]
    source = finished(number).artifacts / "checkpoints" / lesson.LESSON / "latest_checkpoint.pth"
    folder = folder_of(lesson, tmp_path)
    folder.mkdir(parents=True)
    names = ["checkpoint_epoch_5.pth", "best_model.pth", "checkpoint_epoch_10.pth", "latest_checkpoint.pth"]
    for i, name in enumerate(names):
        shutil.copy(source, folder / name)
        os.utime(folder / name, (1000 + i, 1000 + i))
    for i in [3, 2]:  # the last is damaged, then the last but one as well
        (folder / names[i]).write_bytes(source.read_bytes()[:5000])
        os.utime(folder / names[i], (1000 + i, 1000 + i))
        with pytest.raises(SystemExit, match=re.escape(f"that can be read is {folder / names[i - 1]}.")):
            run_lesson(lesson, tmp_path, "--resume")
    (folder / names[3]).unlink()  # killed before the first one was written
    with pytest.raises(
        SystemExit, match=r"^There is no checkpoint .* that can be read is .*best_model.pth\.$"
    ):
        run_lesson(lesson, tmp_path, "--resume")


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_an_older_layout_is_refused(finished, lessons, tmp_path, number):
    """One that lacks any of the keys."""
    lesson = lessons[number]
    checkpoint = load(next(finished(number).artifacts.glob("checkpoints/**/*.pth")))
    for key in checkpoint:
        lesson.save_checkpoint({k: checkpoint[k] for k in checkpoint.keys() - {key}}, tmp_path / "x.pth")
        with pytest.raises(SystemExit, match=r"\(KeyError\)"):
            lesson.load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_checkpoint_with_other_settings_is_refused(finished, lessons, tmp_path, number, capsys):
    lesson = lessons[number]
    checkpoint = load(folder_of(lesson, finished(number).folder) / "latest_checkpoint.pth")
    del checkpoint["hyperparameters"]["lr"]
    lesson.save_checkpoint(checkpoint, tmp_path / "x.pth")
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, "--resume", tmp_path / "x.pth")
    assert error.value.code == 2 and "another version" in capsys.readouterr().err


# Files and folders


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_a_full_disk_leaves_the_old_checkpoint(lessons, tmp_path, number):
    lesson, path = lessons[number], tmp_path / "x.pth"
    lesson.save_checkpoint({"epoch": 1}, path)
    path.with_suffix(".tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        lesson.save_checkpoint({"epoch": 2, "weights": torch.zeros(100_000)}, path)
    assert load(path) == {"epoch": 1}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_a_deleted_tensorboard_folder_does_not_stop_the_training(lessons, tmp_path, monkeypatch, number):
    report_epoch = lessons[number].report_epoch

    def delete_and_report(writer, epoch, *args):
        if epoch == 2:
            writer.flush()
            shutil.rmtree(tmp_path / "tensor_board")
        report_epoch(writer, epoch, *args)

    monkeypatch.setattr(lessons[number], "report_epoch", delete_and_report)
    output = run_lesson(lessons[number], tmp_path, "--subset", 32, "--epochs", 3)
    assert "Epoch  3/3" in output and "Done" in output
    assert list((tmp_path / "tensor_board").rglob("events*"))


@pytest.mark.parametrize("number", ["01", "04", "05", "06"])
def test_pictures_and_reports_are_replaced_whole_or_not_at_all(
    finished, lessons, tmp_path, monkeypatch, number
):
    """An error in the middle of writing leaves those of the run before."""
    shutil.copytree(finished(number).folder, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in [".png", ".json"]}
    assert before

    def half(figure, path, **_):
        Path(path).write_bytes(b"\x89PNG and no more")
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("matplotlib.figure.Figure.savefig", half)
        run_lesson(lessons[number], tmp_path, "--subset", 32)
    changed = [path.name for path in before if path.read_bytes() != before[path]]
    assert changed in [[], ["evaluation_report.json"]], "the report is written before the first picture"
    if number == "06":
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(Path, "write_text", lambda path, text, **_: half(None, path))
            run_lesson(lessons[number], tmp_path, "--subset", 32)
        json.loads((tmp_path / "artifacts" / "evaluation_report.json").read_text(encoding="utf-8"))


TOO_SMALL = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.argv = [sys.argv[1], *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@UNIX
def test_a_disk_that_fills_up_gets_one_sentence_and_status_1(tmp_path):
    """No file may grow beyond 1,000 bytes, as soon TensorBoard's does, which a thread of its own writes."""
    command = [
        sys.executable,
        "-c",
        TOO_SMALL,
        str(PATHS["02"]),
        "1000",
        *FLAGS,
        "--output-dir",
        str(tmp_path),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert "File too large" in line and "--output-dir" in line


# Arguments

TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)
NUMBERS_AND_NAMES = [
    "",
    " ",
    "-1",
    "0",
    "1e999",
    "-inf",
    "nan",
    "9" * 5000,
    "cpu:7",
    "cuda",
    "meta",
    "xla:0",
    "StepLR",
]
PLACES = ["/", ".", "..", "~", "/dev/null", "/nowhere/at/all", "C:\\x", "a" * 300, "\u8def\u5f84", "\udcff"]
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    TEXTS,
    st.sampled_from(NUMBERS_AND_NAMES),
    st.sampled_from(PLACES),
)


class ReachedTheData(Exception):
    """All flags were accepted."""


@pytest.mark.parametrize("number", NUMBERS)
def test_no_arguments_bring_a_traceback(finished, lessons, tmp_path, monkeypatch, request, number, capsys):
    """Every flag with anything behind it: a status of 2 or a sentence, unless the lesson goes on to load its data."""
    lesson = lessons[number]
    flags = [action.option_strings[-1] for action in lesson.build_parser()._actions if action.dest != "help"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished(number).folder, tmp_path, dirs_exist_ok=True)

    def reached(*_, **__):
        raise ReachedTheData

    monkeypatch.setattr(lesson, "load_data", reached)

    @settings(
        max_examples=request.config.getoption("--cases"), deadline=None, database=None, derandomize=True
    )
    @given(st.lists(st.tuples(st.sampled_from(flags), VALUES), min_size=1, max_size=3))
    def check(pairs):
        for flag, value in pairs:  # lesson 06 makes its folders before it loads data
            assume(flag != "--output-dir" or Path(os.path.abspath(value)).is_relative_to(tmp_path))
        argv = [word for flag, value in pairs for word in [flag, value]]
        try:
            lesson.main(["--output-dir", str(tmp_path), *argv])
        except SystemExit as error:
            sentence = (
                error.code
                if isinstance(error.code, str)
                else capsys.readouterr().err.rstrip().splitlines()[-1]
            )
            assert error.code not in [0, None] and sentence.strip()
        except (
            ReachedTheData,
            OSError,
            UnicodeError,
        ):  # of the last two the lines below main() make a sentence
            pass

    check()


# Being stopped

# Runs a lesson in a process of its own, which kills itself in the middle of writing its Nth file if N is above 0.
KILLED = """
import os, runpy, signal, sys
lesson, at, *flags = sys.argv[1:]
fsync, writes = os.fsync, 0
def fsync_or_die(file):
    global writes
    writes += 1
    if writes == int(at):
        os.truncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = fsync_or_die
sys.argv = [lesson, *flags]
runpy.run_path(lesson, run_name="__main__")
"""


@pytest.fixture(scope="module")
def uninterrupted(lessons, tmp_path_factory):
    """A function that returns the folder of a whole run of lesson 03 or 04, how long it took, and its flags."""
    runs = {}

    def get(number):
        if number not in runs:
            more = ["--schedulers", "StepLR", "ReduceLROnPlateau"] if number == "04" else []
            flags = [*FLAGS, "--epochs", "4", *more]
            folder, start = tmp_path_factory.mktemp("uninterrupted"), time.perf_counter()
            run_lesson(lessons[number], folder, *flags)
            runs[number] = folder, time.perf_counter() - start, flags
        return runs[number]

    return get


def stop(number, flags, folder, at, delay, how):
    """Start a lesson, and stop it after the delay or in the middle of its Nth write. Returns the ended process."""
    command = [
        sys.executable,
        "-u",
        "-c",
        KILLED,
        str(PATHS[number]),
        str(at),
        *flags,
        "--output-dir",
        str(folder),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    first = process.stdout.readline()  # the imports are done, the work begins
    if not at:
        time.sleep(delay)
        process.send_signal(how)
    output, errors = process.communicate(timeout=120)
    process.output, process.errors = first + output, errors
    return process


@UNIX
@pytest.mark.parametrize("number", ["03", "04"])
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(
    lessons, uninterrupted, tmp_path, number, request
):
    if number == "04" and request.config.getoption("--kills") == 1:
        pytest.skip("tried with --kills 2 and more")
    lesson, (whole, seconds, flags) = lessons[number], uninterrupted(number)
    draw = random.Random(request.config.getoption("--kills"))
    for i in range(request.config.getoption("--kills")):
        folder = tmp_path / str(i)
        at = draw.randint(1, 6) if i % 3 == 0 else 0
        killed = stop(number, flags, folder, at, draw.uniform(0, seconds), signal.SIGKILL)
        time.sleep(1)  # TensorBoard sorts the files of a run by the second in which they were begun
        checkpoints = folder_of(lesson, folder)
        there = (checkpoints / "latest_checkpoint.pth").exists()
        output = run_lesson(lesson, folder, *flags, *(["--resume"] if there else []))
        printed = len(re.findall("^Epoch ", killed.output, flags=re.MULTILINE))
        again = len(re.findall("^Epoch ", output, flags=re.MULTILINE))
        total = 8 if number == "04" else 4
        assert total - printed <= again <= total - printed + 1, (
            "at most the epoch that was not saved is repeated"
        )
        for path in folder_of(lesson, whole).iterdir():
            assert_same_state(load(checkpoints / path.name), load(path))
        for events in (whole / "tensor_board").rglob("events*"):
            # A run that was killed before its first checkpoint began anew, as run_2.
            runs = sorted((folder / events.parent.parent.relative_to(whole)).iterdir())
            assert read_scalars(runs[-1]) == read_scalars(events.parent), "the same points, each of them once"


@UNIX
@pytest.mark.parametrize("number", NUMBERS)
def test_interrupted_at_any_moment_it_says_so_in_one_line(lessons, tmp_path, number, request):
    rounds = request.config.getoption("--kills")
    if rounds == 1 and number != "06":
        pytest.skip("tried with --kills 2 and more")
    draw = random.Random(rounds)
    for i in range(rounds):
        folder = tmp_path / str(i)
        flags = [*FLAGS, "--epochs", "3", *(["--schedulers", "StepLR"] if number == "04" else [])]
        stopped = stop(number, flags, folder, 0, draw.uniform(0, 3), signal.SIGINT)
        if stopped.returncode == 0:
            continue  # it was quicker
        assert stopped.returncode == 130, stopped.errors
        [line] = stopped.errors.strip().splitlines()
        assert line.startswith("Stopped.")
        for path in folder.rglob("*.png"):
            assert path.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82"), path
        for path in folder.rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        for path in folder.rglob("*.pth"):
            lessons[number].load_checkpoint(path)
        for events in folder.rglob("events*"):
            read_scalars(events.parent)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ModuleNotFoundError: No module named 'numpy'"])
def test_stopped_while_it_begins_it_shows_no_traceback(tmp_path, number, error):
    """By Ctrl-C while the libraries load, or by one that is not installed."""
    kind, _, text = error.partition(": ")
    (tmp_path / "numpy.py").write_text(
        f"raise {kind}({text!r})", encoding="utf-8"
    )  # found before the real one
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(PATHS[number])]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode != 0 and process.stdout == ""
    assert process.stderr.strip() == error


@pytest.mark.parametrize("number", NUMBERS)
def test_an_error_that_nobody_foresaw_shows_where_it_happened(monkeypatch, number):
    monkeypatch.setattr(sys, "argv", [str(PATHS[number]), "--epochs", "none"])
    monkeypatch.setattr("threading.excepthook", None)  # the lessons set it: put it back afterwards
    with (
        pytest.raises(SystemExit),
        contextlib.redirect_stdout(io.StringIO()),
    ):  # as in a notebook: no reconfigure()
        runpy.run_path(str(PATHS[number]), run_name="__main__")
    assert not hasattr(sys, "tracebacklimit")


# Pictures


def test_03_reads_pictures_of_every_kind(lessons, tmp_path):
    """A red picture in every mode and format is red, a grey one grey."""
    red = Image.new("RGB", (50, 40), (200, 0, 0))
    pictures = {
        "a.png": red, "b.jpg": red, "c.webp": red, "d.gif": red, "e.bmp": red, "f.tiff": red,
        "palette.png": red.convert("P"), "transparent.png": red.convert("RGBA"),
        "cmyk.jpg": red.convert("CMYK"), "one_pixel.png": red.resize((1, 1)), "line.png": red.resize((3000, 1)),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        pixels = lessons["03"].read_picture(tmp_path / name)
        assert pixels.shape == (1, 32, 32, 3) and pixels.dtype == torch.uint8, name
        assert (pixels.float() - torch.tensor([200.0, 0, 0])).abs().mean() < 5, name
    Image.fromarray(np.full((40, 50), 128, dtype=np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((40, 50), 128 * 257, dtype=np.uint16)).save(tmp_path / "16_bits.png")
    for name in ["grey.png", "16_bits.png"]:
        assert set(lessons["03"].read_picture(tmp_path / name).flatten().tolist()) == {128}, name


def test_03_refuses_pictures_that_would_fill_the_memory(lessons, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    with pytest.raises(
        SystemExit, match=r" is 20000 x 20000, over 50 million pixels\. Scale it down first\.$"
    ):
        lessons["03"].read_picture(tmp_path / "large.png")
    Image.new("RGB", (500, 500), (9, 99, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with ZipFile(tmp_path / "zip.png", "w") as file:
        file.writestr("x", "no picture")
    for name in ["cut.jpg", "zip.png"]:
        with pytest.raises(SystemExit, match="^Cannot read .* as a picture"):
            lessons["03"].read_picture(tmp_path / name)
