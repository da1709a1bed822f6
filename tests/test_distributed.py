"""Lesson 12: several processes do what one does, nothing is counted twice, and no death loses more than an epoch.

Two starts of torchrun serve all tests of this file, since every process takes seconds to import PyTorch. The first, in
which a process is killed on the way, is compared with the second, which nobody disturbs.
"""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from common import read_scalars
from conftest import CPU, PATHS, UNIX, assert_same_state, folder_of, in_background, load, run_lesson
from torch import nn

PATH = PATHS["12"]
IMAGES = 131  # of each split: odd, so that two processes cannot share them evenly
RUN = ["--data", "digits", "--subset", str(IMAGES), "--batch-size", "32", "--epochs", "4", "--device", "cpu"]
PLAIN = ["--subset", "320", "--batch-size", "32", "--epochs", "1", "--device", "cpu"]  # ten steps
TIMEOUT = 600  # seconds, for a machine that is busy with other things

# What runs in each process of the first start: main() three times, spied upon. The first time process 1 kills itself in
# its third epoch, so torchrun starts both again; the last time it leaves without a word.
WORKER = """
import importlib.util, json, os, signal, sys, time
import torch
import torch.distributed as dist
from torch import nn

path, out = sys.argv[1:3]
runs = json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("lesson_12", path)
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
log = {"epochs": [], "loads": [], "saves": []}
run = 0

def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}

def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch, original=lesson.train_one_epoch):
    if run == 0 and attempt == 0 and epoch == 3:
        dist.barrier()  # now both have written what they saw in epoch 2
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and run == 2:
        os._exit(7)
    seen = {"run": run, "epoch": epoch, "seed": torch.initial_seed(), "loss": 0.0, "correct": 0}
    seen |= {"size": loader.batch_size, "train": list(loader.sampler), "before": weights(model.module)}
    def spied(logits, labels):
        loss = loss_fn(logits, labels)
        seen["loss"] += loss.item() * len(labels)
        seen["correct"] += (logits.argmax(1) == labels).sum().item()
        return loss
    result = original(model, loader, spied, optimizer, device, epoch)
    log["epochs"].append(seen)
    return result

def evaluate(model, loader, device, original=lesson.evaluate):
    log["epochs"][-1] |= {"val": list(loader.dataset.indices), "after": weights(model)}
    result = original(model, loader, device)
    log["epochs"][-1]["result"] = result
    torch.save(log, f"{out}/rank_{rank}_attempt_{attempt}.pt")
    return result

def load_data(name, data_dir, train, original=lesson.load_data):
    began = time.monotonic()
    time.sleep(0.2 * (1 - rank))
    result = original("digits", data_dir, train)
    log["loads"].append((run, name, began, time.monotonic()))
    return result

def save_checkpoint(checkpoint, path, original=lesson.save_checkpoint):
    log["saves"].append(str(path))
    original(checkpoint, path)

class Plain(lesson.SimpleCNN):
    def __init__(self, *args):
        super().__init__(*args)
        self.bn1 = self.bn2 = self.bn3 = nn.Identity()

for function in [train_one_epoch, evaluate, load_data, save_checkpoint]:
    setattr(lesson, function.__name__, function)
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
lesson.main(runs[0])
lesson.join_processes = lambda device: dist.get_rank()  # still the same group
lesson.SimpleCNN, run = Plain, 1
lesson.main(runs[1])
run = 2
lesson.main(runs[2])
"""


def torchrun(*words):
    """Start torchrun, with one thread in every process."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*started):
    """Wait for what torchrun() returned, and return the output, errors and status of each."""
    try:
        ended = [process.communicate(timeout=TIMEOUT) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()  # it then ends its own processes
                process.wait(60)
    return [
        SimpleNamespace(out=out, err=err, status=process.returncode)
        for (out, err), process in zip(ended, started, strict=True)
    ]


@pytest.fixture(scope="module")
def lesson(lessons):
    return lessons["12"]


@in_background
def killed(folder):
    """Two processes; the second is killed in epoch 3, both start again, train without BatchNorm, and one leaves."""
    worker = folder / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    first, plain, last = (folder / name for name in ["first", "plain", "last"])
    runs = [
        [*RUN, "--output-dir", str(first)],
        [*PLAIN, "--output-dir", str(plain)],
        [*RUN, "--output-dir", str(last)],
    ]
    words = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", worker, PATH, folder, json.dumps(runs)]
    [result] = finish(torchrun(*words))
    logs = {
        (rank, attempt): torch.load(folder / f"rank_{rank}_attempt_{attempt}.pt", weights_only=True)
        for rank in [0, 1]
        for attempt in [0, 1]
    }
    return SimpleNamespace(result=result, logs=logs, first=first, plain=plain, last=last)


@in_background
def machines(folder):
    """The same training on two "machines": two torchruns that meet on this one's loopback, each with one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    words += ["--rdzv-id=lesson", "--local-addr=127.0.0.1", PATH, *RUN]
    results = finish(*(torchrun(*words, "--output-dir", folder / name) for name in "ab"))
    # Which of the two has rank 0 is not known before
    results.sort(key=lambda result: "Epoch" not in result.out)
    written = [folder / name for name in "ab" if (folder / name).exists()]
    return SimpleNamespace(results=results, written=written)


def epochs_of(killed, run=0):
    """Return the epochs of a run as [(seen by process 0, seen by process 1)], those before the death included."""
    seen = {rank: [] for rank in [0, 1]}
    for (rank, _), log in sorted(killed.logs.items()):
        seen[rank] += [epoch for epoch in log["epochs"] if epoch["run"] == run]
    return list(zip(seen[0], seen[1], strict=True))


# Two processes


@UNIX
def test_ten_steps_of_two_processes_are_those_of_one(lesson, killed, tmp_path, monkeypatch):
    """Without BatchNorm, whose statistics are of a process's own images."""

    class Plain(lesson.SimpleCNN):
        def __init__(self, *args):
            super().__init__(*args)
            self.bn1 = self.bn2 = self.bn3 = nn.Identity()

    monkeypatch.setattr(lesson, "SimpleCNN", Plain)
    run_lesson(lesson, tmp_path, *PLAIN)
    one = load(folder_of(lesson, tmp_path) / "latest_checkpoint.pth")
    two = load(folder_of(lesson, killed.plain) / "latest_checkpoint.pth")
    [(before, _)] = epochs_of(killed, run=1)
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().max() < 1e-6
        assert not torch.equal(weight, before["before"][name]), "they have moved"
    for curve in ["Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val"]:
        assert one["history"][0][curve] == pytest.approx(two["history"][0][curve], rel=1e-5)


@UNIX
def test_shares_of_the_training_images_are_every_second_one_of_a_new_order_each_epoch(killed):
    orders = []
    for epoch, seen in enumerate(epochs_of(killed), start=1):
        assert [process["epoch"] for process in seen] == [epoch, epoch] and seen[0]["size"] == 16
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        assert [process["train"] for process in seen] == [order[0::2], [*order[1::2], order[0]]], (
            "one comes twice"
        )
        orders.append(order)
    assert len(orders) == 4 and len({tuple(order) for order in orders}) == 4


@UNIX
def test_validation_counts_every_image_once(lesson, killed, tmp_path):
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    _, val_set = lesson.split_train_val(images, labels, 42, IMAGES)
    pixels, labels = val_set.tensors
    for seen in epochs_of(killed):
        assert sorted(seen[0]["val"] + seen[1]["val"]) == list(range(IMAGES))
        model = lesson.SimpleCNN()
        model.load_state_dict(seen[0]["after"])
        with torch.no_grad():
            logits = model.eval()(lesson.to_input(pixels, CPU))
        accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
        expected = pytest.approx((nn.functional.cross_entropy(logits, labels).item(), accuracy), rel=1e-5)
        assert seen[0]["result"] == expected and seen[1]["result"] == seen[0]["result"]


@UNIX
def test_training_figures_are_those_of_both_processes(lesson, killed):
    history = load(folder_of(lesson, killed.first) / "latest_checkpoint.pth")["history"]
    for row, seen in zip(history, epochs_of(killed), strict=True):
        images = IMAGES + 1
        assert row["Loss/train"] == pytest.approx(sum(p["loss"] for p in seen) / images, rel=1e-5)
        assert row["Accuracy/train"] == pytest.approx(100 * sum(p["correct"] for p in seen) / images)
        assert row["ImagesPerSecond"] == pytest.approx(images / row["Seconds"])
        assert (row["Loss/val"], row["Accuracy/val"]) == seen[0]["result"]


@UNIX
def test_processes_have_the_same_weights_and_other_random_numbers(lesson, killed):
    torch.manual_seed(42)
    epochs = epochs_of(killed)
    assert_same_state(dict(epochs[0][0]["before"]), dict(lesson.SimpleCNN().state_dict()))
    for seen in epochs:
        for moment in ["before", "after"]:  # after an epoch BatchNorm's statistics, too
            assert_same_state(seen[0][moment], seen[1][moment])
    assert len({process["seed"] for seen in epochs for process in seen}) == 2 * len(epochs)


@UNIX
def test_process_0_alone_writes_and_prints(lesson, killed):
    saves = {key: log["saves"] for key, log in killed.logs.items()}
    assert saves[1, 0] == saves[1, 1] == [] and saves[0, 0] and saves[0, 1]
    lines = [line for line in killed.result.out.splitlines() if line.startswith("Epoch")]
    assert [line.split("|")[0] for line in lines] == [
        *[f"Epoch  {epoch}/4 " for epoch in [1, 2, 3, 4]],
        "Epoch  1/1 ",
    ]
    assert killed.result.out.count("Processes: 2 | CPU threads in each: 1") == 4
    runs = {path.parent.name for path in killed.first.rglob("events*")}
    assert runs == {"digits_run_1"}
    [run] = (killed.first / "tensor_board").glob("*/*")
    assert [step for step, _ in read_scalars(run)["Accuracy/val"]] == [1, 2, 3, 4]
    model = load(folder_of(lesson, killed.first) / "best_model.pth")["model"]
    assert model.keys() == lesson.SimpleCNN().state_dict().keys(), "no module. in front"


@UNIX
def test_data_is_loaded_in_turn_and_auto_means_the_same_for_all(killed):
    """main() says "auto" in the second run; process 0 found digits."""
    loads = [[load for load in killed.logs[rank, 1]["loads"] if load[0] == 1] for rank in [0, 1]]
    [[(_, first, _, ended)], [(_, second, began, _)]] = loads
    assert (first, second) == ("auto", "digits") and began >= ended


# Deaths


@UNIX
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(lesson, killed, machines):
    assert killed.logs[0, 1]["epochs"], "both have started again"
    assert "2 of 4 epochs are done." in killed.result.out
    [written] = machines.written
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        one = load(folder_of(lesson, killed.first) / name)
        assert_same_state(one, load(folder_of(lesson, written) / name))
    assert len(load(folder_of(lesson, killed.first) / "latest_checkpoint.pth")["history"]) == 4
    assert list(folder_of(lesson, killed.first).parent.iterdir()) == [folder_of(lesson, killed.first)]


@UNIX
def test_one_that_leaves_ends_the_other(lesson, killed):
    assert killed.result.status == 1 and re.search(r"exitcode +: 7", killed.result.err)
    assert "[rank0]: Traceback" not in killed.result.err
    assert load(folder_of(lesson, killed.last) / "latest_checkpoint.pth")["history"] == []


@UNIX
def test_two_torchruns_meet_as_on_two_machines(machines):
    first, second = machines.results
    assert first.status == second.status == 0, first.err + second.err
    assert "Processes: 2 |" in first.out and "Epoch  4/4" in first.out and "Done." in first.out
    assert second.out == "" and len(machines.written) == 1


def test_a_lost_connection_is_one_sentence_and_other_errors_are_not(lesson, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(lesson, "train", fail)
    monkeypatch.setattr(lesson.os, "_exit", sys.exit)
    message = "[pair.cc:545] Read error [127.0.0.1]:946: Connection reset by peer"
    with pytest.raises(SystemExit) as stop:
        run_lesson(lesson, tmp_path)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("Process 0 stops, since another one has ended")
    message = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1"):
        run_lesson(lesson, tmp_path)


def test_a_restart_is_known_by_its_id(lesson, tmp_path, monkeypatch):
    for number, text in enumerate(["one", "two", "three"], start=1):
        folder = tmp_path / f"digits_run_{number}"
        folder.mkdir()
        (folder / "torchrun_id.txt").write_text(text)
        if text != "three":
            (folder / "latest_checkpoint.pth").touch()
    args = SimpleNamespace(resume=None)
    for run_id, expected in [("one", 1), ("two", 2), ("three", None), ("none", None)]:
        monkeypatch.setattr(lesson, "RUN_ID", run_id)
        found = lesson.find_checkpoint(args, tmp_path)
        assert found == (expected and tmp_path / f"digits_run_{expected}" / "latest_checkpoint.pth")
    monkeypatch.setattr(lesson, "RUN_ID", "one")
    args.resume = "newest"  # a restart of a run that began with --resume goes on with its own checkpoint
    assert lesson.find_checkpoint(args, tmp_path).parent.name == "digits_run_1"


def test_ctrl_c_tells_the_command_that_goes_on(lesson, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lesson, "train", stop)
    for launched, expected in [
        (False, f"{sys.executable} {PATH}"),
        (True, "--standalone --nproc_per_node=1 "),
    ]:
        monkeypatch.setattr(lesson, "quote", " ".join)
        with pytest.raises(KeyboardInterrupt) as error:
            with monkeypatch.context() as patch:
                join = lesson.join_processes

                def join_processes(device, join=join, patch=patch, launched=launched):
                    rank = join(device)
                    patch.setattr(dist, "is_torchelastic_launched", lambda: launched)
                    return rank

                patch.setattr(lesson, "join_processes", join_processes)
                run_lesson(lesson, tmp_path)
        assert expected in str(error.value) and "--resume" in str(error.value)
        assert ("torch.distributed.run" in str(error.value)) == launched


# One process


def test_one_process_trains_with_the_same_code(lesson, tmp_path):
    output = run_lesson(lesson, tmp_path, "--epochs", 2)
    folder = folder_of(lesson, tmp_path)
    best = load(folder / "best_model.pth")
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    _, val_set = lesson.split_train_val(images, labels, 42, 256)
    model = lesson.SimpleCNN()
    model.load_state_dict(best["model"])
    with torch.no_grad():
        answers = model.eval()(lesson.to_input(val_set.tensors[0], CPU)).argmax(1)
    accuracy = 100 * (answers == val_set.tensors[1]).double().mean().item()
    best_epoch = len(best["history"])
    assert f"Best validation accuracy on digits: {accuracy:.2f} % in epoch {best_epoch}." in output
    assert "Processes: 1 |" in output and not dist.is_initialized()
    history = load(folder / "latest_checkpoint.pth")["history"]
    for row, line in zip(history, re.findall(r"^Epoch.*", output, re.MULTILINE), strict=True):
        assert row["ImagesPerSecond"] == pytest.approx(256 / row["Seconds"])
        assert f"| {row['ImagesPerSecond']:,.0f} images/s |" in line
    assert not (folder / "torchrun_id.txt").exists()


def test_resume_goes_on_exactly(lesson, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_lesson(lesson, whole, *RUN)
    run_lesson(lesson, parts, *RUN, "--epochs", 2)
    run_lesson(lesson, parts, "--data", "digits", "--epochs", 4, "--subset", IMAGES, "--resume")
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        one, other = (load(folder_of(lesson, folder) / name) for folder in [whole, parts])
        assert_same_state(one, other)


@UNIX
def test_a_checkpoint_of_two_processes_goes_on_in_one(lesson, killed, tmp_path):
    saved = folder_of(lesson, killed.first) / "latest_checkpoint.pth"
    output = run_lesson(lesson, tmp_path, "--subset", IMAGES, "--epochs", 5, "--resume", saved)
    assert "4 of 5 epochs are done." in output and "Epoch  5/5" in output


def test_a_damaged_optimizer_is_noticed_before_the_training(lesson, tmp_path):
    run_lesson(lesson, tmp_path, "--subset", 32)
    path = folder_of(lesson, tmp_path) / "latest_checkpoint.pth"
    checkpoint = load(path)
    checkpoint["optimizer"]["param_groups"][0]["params"].pop()
    lesson.save_checkpoint(checkpoint, path)
    with pytest.raises(SystemExit, match="is damaged or not for this lesson"):
        run_lesson(lesson, tmp_path, "--subset", 32, "--epochs", 2, "--resume")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", "9"], "--batch-size must be a multiple of the 2 processes"),
        (["--device", "mps"], "invalid choice: 'mps'"),
    ],
)
def test_bad_arguments_are_one_sentence(lesson, monkeypatch, capsys, flags, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        lesson.parse_args(["--data", "digits", *flags])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert lesson.parse_args(["--batch-size", "8", "--device", "cpu"]).batch_size == 8
