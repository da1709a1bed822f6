"""What the README and the docstrings tell people to type works, and what they name exists."""

import re
import shlex

import pytest
from conftest import FILES, ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md"), *FILES])
COMMAND = re.compile(r"python[\w.]* +(src[/\\]experiments[/\\]model_train[/\\](0\d)_\w+\.py)([^\n`|&#]*)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses_with_its_lessons_own_parser(lessons, document):
    for file, number, flags in COMMAND.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / file.replace("\\", "/")).exists(), file
        lessons[number].build_parser().parse_args(shlex.split(flags))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_lesson_says_how_to_run_it_and_what_to_expect(path):
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    assert docstring.startswith(f"Lesson {path.stem[:2]}: ")
    commands = COMMAND.findall(docstring)
    assert len(commands) >= 2 and all(file.endswith(path.name) for file, _, _ in commands)
    assert "--subset" in docstring, "a quick look"
    assert "JPEG copy of CIFAR-10" in docstring and "seed" in docstring, "measured figures say on what"
    assert "Exercises" in docstring or "# Exercises" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_readme_lists_every_lesson_and_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in readme for path in FILES)
    install = "python3 -m venv .venv && .venv/bin/python -m pip install -r requirements.txt && .venv/bin/python "
    assert install + "src/experiments/model_train/01_basic_training.py\n" in readme
    assert install + "-m pytest\n" in readme
