"""The test images are for the end, in the lessons that have the older form (07 to 12)."""

import pytest
from conftest import TINY, run_lesson

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_test_images_are_loaded_after_the_choice_of_the_model(lessons, tmp_path, monkeypatch):
    lesson, calls = lessons["08"], []
    load_data, train = lesson.load_data, lesson.train

    def load(name, data_dir, train):
        calls.append(f"load train={train}")
        return load_data(name, data_dir, train)

    def spy(*args):
        result = train(*args)
        calls.append("trained")
        return result

    monkeypatch.setattr(lesson, "load_data", load)
    monkeypatch.setattr(lesson, "train", spy)
    run_lesson(lesson, tmp_path, "--subset", 64)
    assert calls == ["load train=True", "trained", "load train=False"]


@pytest.mark.parametrize(
    "number", ["07", "09", "11", "12"]
)  # lesson 11 tests on pictures that it made of these
def test_other_lessons_never_load_the_test_split(lessons, tmp_path, monkeypatch, number):
    lesson, splits = lessons[number], []
    load_data = lesson.load_data
    monkeypatch.setattr(
        lesson, "load_data", lambda *args, train: (splits.append(train), load_data(*args, train=train))[1]
    )
    run_lesson(lesson, tmp_path, *TINY[number])
    assert splits == [True]
