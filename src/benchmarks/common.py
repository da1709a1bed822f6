"""What the benchmarks share: a lesson as a module, the curves of a run, and a description of the machine."""

import importlib.util
import os
import platform
from pathlib import Path

import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds src/, docs/ and artifacts/
LESSONS = ROOT / "src" / "experiments" / "model_train"


def load_lesson(number):
    """Import a lesson, "01" to "06", from its file; its name begins with a digit, so `import` cannot."""
    path = next(LESSONS.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"lesson_{number}", path)
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def read_scalars(run_dir):
    """Return the curves of one TensorBoard run: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def describe_machine():
    """Return what the figures depend on, in words and plain numbers: processor, cores, memory, versions."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux knows the name of the processor, but Python does not ask there
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # the widest that PyTorch uses here: AVX2, AVX512, ...
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
