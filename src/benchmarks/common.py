"""What the benchmarks share: flags, a lesson as a module, the curves of a run, timing, the name of the machine."""

import argparse
import importlib.util
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds src/, docs/ and artifacts/
LESSONS = ROOT / "src" / "experiments" / "model_train"
LAUNCHER = "a Python script that runs the lesson and the flags given to it"
PATHS = {path.name[:2]: path for path in sorted(LESSONS.glob("[01]*.py"))}  # "01" to "12"


def make_parser():
    """Return a parser of the flags that most benchmarks have: the data, and the file for the measurements."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="cifar10", help="as in the lessons")
    add("--data-dir", type=Path, default=ROOT / "data", help="as in the lessons")
    add("--data-name", default="CIFAR-10", help="what the tables call the data")
    add("--json", type=Path, metavar="PATH", help="write the measurements to this file")
    return parser


def load_lesson(number):
    """Import a lesson, "01" to "12", from its file; its name begins with a digit, so `import` cannot."""
    spec = importlib.util.spec_from_file_location(f"lesson_{number}", PATHS[number])
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def read_scalars(run_dir):
    """Return the curves of one TensorBoard run: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def read_json(path, default=None):
    """Return what a JSON file holds, or the default if there is no such file, or no path."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else default


def write_json(path, content):
    """Write a dict or list into a file, if there is a path. In one step, so that a crash cannot leave half of it."""
    if path is None:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def measure(tasks, rounds):
    """Time all tasks in turn. tasks: {name: function}. Return seconds as {name: array (rounds,)}."""
    seconds = {name: [] for name in tasks}
    for number in tqdm(range(rounds + 1), unit="round", disable=None):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if number > 0:  # round 0 starts workers and fills caches
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values):
    """Return median, least and greatest of an array as a dict of plain numbers."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def describe_machine():
    """Return what the measurements depend on, in words and plain numbers: processor, cores, versions."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux knows the name of the processor, but Python does not ask there
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":")[1].strip() if lines else processor
    return {
        "processor": processor or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # the widest PyTorch uses here: AVX2, ...
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "torchvision": torchvision.__version__.split("+")[0],
    }


def machine_in_words(machine):
    """Return one line about a machine that describe_machine() described."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}, {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}, torchvision {machine['torchvision']}"
    )
