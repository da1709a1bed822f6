"""What can go wrong while a lesson runs: nothing is lost, and one clear sentence says what to do."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import read_scalars
from conftest import (
    CPU,
    FLAGS,
    IMAGES,
    PATHS,
    TINY,
    UNIX,
    assert_same_state,
    checkpoints_of,
    folder_of,
    in_background,
    load,
    no_group_left,
    parser_of,
    run_lesson,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NUMBERS = ["07", "08", "09", "10", "11", "12"]
RESUMES = ["07", "08", "11", "12"]

# Numbers


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [number for number in NUMBERS if number != "09"])  # there it is the point
def test_a_learning_rate_out_of_all_reason_ends_the_lesson(lessons, tmp_path, number):
    with pytest.raises(SystemExit, match=r"^Epoch \d+, .+: the loss is (nan|inf), .* --lr is too high"):
        run_lesson(lessons[number], tmp_path, "--lr", 1e9, "--epochs", 3, "--batch-size", 16)
    kept = [path for path in tmp_path.rglob("*.pth") if load(path)["history"]]
    assert kept == [], "nothing but the state before the first epoch"


@pytest.mark.parametrize("number", ["08", "10", "11"])
def test_nan_is_noticed_within_100_batches(lessons, number):
    images = TensorDataset(torch.zeros(230, 32, 32, 3, dtype=torch.uint8), torch.zeros(230).long())
    for bad, noticed in [(3, 101), (102, 115)]:
        batches = []

        def loss_fn(logits, labels, batches=batches, bad=bad):
            batches.append(labels)
            return nn.functional.cross_entropy(logits, labels) * (float("nan") if len(batches) == bad else 1)

        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))  # small and quick
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(SystemExit, match=f"^Epoch 7, batch {noticed}: the loss is nan"):
            lessons[number].train_one_epoch(model, DataLoader(images, 2), loss_fn, optimizer, CPU, 7)
        assert len(batches) == noticed


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", RESUMES)
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_bad_loss_is_never_saved(finished, lessons, tmp_path, monkeypatch, number, loss):
    """Neither over the latest checkpoint nor over the best model, even if the accuracy seems to be better."""
    lesson = lessons[number]
    shutil.copytree(finished(number).folder, tmp_path, dirs_exist_ok=True)
    if number != "12":  # go on as if one more epoch were to be trained
        for path in folder_of(lesson, tmp_path).rglob("*.pth"):
            checkpoint = load(path)
            checkpoint["hyperparameters"]["epochs"] = 2
            lesson.save_checkpoint(checkpoint, path)
    before = checkpoints_of(lesson, tmp_path)
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (loss, 100.0))
    with pytest.raises(SystemExit, match="^Epoch 2, validation: the loss is"):
        run_lesson(lesson, tmp_path, "--epochs", 2, "--subset", IMAGES.get(number, 256), "--resume")
    assert before and checkpoints_of(lesson, tmp_path) == before


# Checkpoints


def test_damage_anywhere_in_a_checkpoint_is_noticed(finished, lessons, tmp_path):
    """Cut off at 20 places, and with one bit changed at 60: refused, unless the weights are the same all the same."""
    lesson, place = lessons["12"], random.Random(0)
    content = (folder_of(lesson, finished("12").folder) / "best_model.pth").read_bytes()
    weights = load(io.BytesIO(content))["model"]
    path, refused = tmp_path / "x.pth", 0
    damaged = [content[: len(content) * i // 20] for i in range(20)]
    for _ in range(60):
        position, bit = place.randrange(len(content)), 1 << place.randrange(8)
        damaged.append(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
    for damage in damaged:
        path.write_bytes(damage)
        try:
            model = lesson.SimpleCNN()
            lesson.load_checkpoint(path, {"model": model})
        except SystemExit as error:
            assert str(error.code).startswith(
                f"{path} is damaged or not for this lesson"
            ) and "\n" not in str(error.code)
            refused += 1
        else:
            assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert refused >= 70


# Files and folders


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("number", ["07", "08", "10", "11", "12"])
def test_a_full_disk_leaves_the_old_checkpoint(lessons, tmp_path, number):
    lesson, path = lessons[number], tmp_path / "x.pth"
    lesson.save_checkpoint({"epoch": 1}, path)
    path.with_suffix(".tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        lesson.save_checkpoint({"epoch": 2, "weights": torch.zeros(100_000)}, path)
    assert load(path) == {"epoch": 1}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["07", "08", "10", "11", "12"])
def test_a_deleted_tensorboard_folder_does_not_stop_the_training(lessons, tmp_path, monkeypatch, number):
    report_epoch = lessons[number].report_epoch

    def delete_and_report(writer, epoch, *args):
        if epoch == 2:
            writer.flush()
            shutil.rmtree(tmp_path / "tensor_board")
        report_epoch(writer, epoch, *args)

    monkeypatch.setattr(lessons[number], "report_epoch", delete_and_report)
    output = run_lesson(lessons[number], tmp_path, *TINY[number], "--epochs", 3)
    assert "Epoch  3/3" in output and "Done" in output
    assert list((tmp_path / "tensor_board").rglob("events*"))


TOO_SMALL = """
import resource, runpy, sys
import torchvision, torch.utils.tensorboard  # some versions write files while they are imported
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.argv = [sys.argv[1], *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@in_background
def old_full_disk(folder):
    """Lesson 09 in a process that may write no file beyond 1,000 bytes, as soon TensorBoard's is."""
    command = [sys.executable, "-c", TOO_SMALL, str(PATHS["09"]), "1000", *FLAGS, "--output-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@UNIX
def test_a_disk_that_fills_up_gets_one_sentence_and_status_1(old_full_disk):
    """TensorBoard writes in a thread of its own. What that prints by itself stands beside the sentence."""
    assert old_full_disk.returncode == 1
    assert re.search(
        r"Cannot use a file or folder: .*File too large\. Name others: .*--output-dir", old_full_disk.stderr
    )


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
    flags = [action.option_strings[-1] for action in parser_of(lesson)._actions if action.dest != "help"]
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
        for flag, value in pairs:
            assume(flag != "--output-dir" or Path(os.path.abspath(value)).is_relative_to(tmp_path))
        argv = [word for flag, value in pairs for word in [flag, value]]
        try:
            with no_group_left():
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
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored
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
    """A function that returns the folder of a whole run of lesson 12 or 11, how long it took, and its flags."""
    runs = {}

    def get(number):
        if number not in runs:
            flags = [*FLAGS, "--epochs", "4"]
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
@pytest.mark.parametrize("number", ["12", "11"])
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(
    lessons, uninterrupted, tmp_path, number, request
):
    if number == "11" and request.config.getoption("--kills") == 1:
        pytest.skip("tried with --kills 2 and more")
    lesson, (whole, seconds, flags) = lessons[number], uninterrupted(number)
    draw, resumed = random.Random(request.config.getoption("--kills")), 0
    for i in range(request.config.getoption("--kills")):
        folder = tmp_path / str(i)
        at = (
            (5 if i == 0 else draw.randint(1, 9)) if i % 3 == 0 else 0
        )  # 5: best_model.pth or the latest of epoch 2
        killed = stop(number, flags, folder, at, draw.uniform(0, seconds), signal.SIGKILL)
        time.sleep(1)  # TensorBoard sorts the files of a run by the second in which they were begun
        there = bool(list(folder_of(lesson, folder).rglob("latest_checkpoint.pth")))
        output = run_lesson(lesson, folder, *flags, *(["--resume"] if there else []))
        resumed += bool(re.search("[1-9] of 4 epochs are done", output))
        printed = len(re.findall("^Epoch ", killed.output, flags=re.MULTILINE))
        again = len(re.findall("^Epoch ", output, flags=re.MULTILINE))
        total = 8 if number == "11" else 4
        assert total - printed <= again <= total - printed + 1, (
            "at most the epoch that was not saved is repeated"
        )
        run = sorted(folder_of(lesson, folder).parent.iterdir())[-1]
        for path in folder_of(lesson, whole).rglob("*.pth"):
            assert_same_state(load(run / path.relative_to(folder_of(lesson, whole))), load(path))
        for events in (whole / "tensor_board").rglob("events*"):
            curves = events.parent.relative_to(folder_of_curves(lesson, whole))
            points, expected = (
                read_scalars(folder_of_curves(lesson, folder, run.name) / curves),
                read_scalars(events.parent),
            )
            for scalars in [points, expected]:
                scalars.pop("Seconds", None)
                scalars.pop("ImagesPerSecond", None)
            assert points == expected, "the same points, each of them once"
    assert resumed, "one of them was killed after its first epoch"


def folder_of_curves(lesson, output_dir, run="digits_run_1"):
    return output_dir / "tensor_board" / lesson.LESSON / run


FOR_EVER = [*FLAGS, "--epochs", "100000"]


@in_background
def old_interrupted(folder):
    """Lesson 12, with Ctrl-C after a moment."""
    return stop("12", FOR_EVER, folder, 0, 1.5, signal.SIGINT), folder


@UNIX
@pytest.mark.parametrize("number", NUMBERS)
def test_interrupted_at_any_moment_it_says_so_in_one_line(
    lessons, tmp_path, old_interrupted, number, request
):
    rounds = request.config.getoption("--kills")
    if rounds == 1 and number != "12":
        pytest.skip("tried with --kills 2 and more")
    draw = random.Random(rounds)
    for i in range(rounds):
        if number == "12" and i == 0:
            stopped, folder = old_interrupted
        else:
            folder = tmp_path / str(i)
            stopped = stop(number, FOR_EVER, folder, 0, draw.uniform(0, 3), signal.SIGINT)
        assert stopped.returncode == 130, stopped.errors
        [line] = stopped.errors.strip().splitlines()
        assert line.startswith("Stopped.")
        if number in RESUMES:
            assert f"--resume {folder_of(lessons[number], folder)}" in line
        for path in folder.rglob("*.pth"):
            lessons[number].load_checkpoint(path)
        for events in folder.rglob("events*"):
            read_scalars(events.parent)
