"""Exercises: blanks are skipped, the lessons' functions pass, typical wrong answers get their hint."""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from exercises.checks import EXERCISES, Exercise, Wrong, check

ROOT = Path(__file__).parent.parent


def names(value: object) -> str:
    return f"{value.lesson}-{value.name}" if isinstance(value, Exercise) else ""


@pytest.mark.parametrize("exercise", EXERCISES, ids=names)
def test_a_blank_is_not_done(exercise: Exercise) -> None:
    function = getattr(import_module(f"exercises.{exercise.lesson}"), exercise.name)
    with pytest.raises(NotImplementedError):
        check(exercise, function)
    assert re.search(r"\d+ min$", function.__doc__.strip().splitlines()[0]) or re.search(r"\d+ min", function.__doc__)


@pytest.mark.parametrize("exercise", EXERCISES, ids=names)
def test_the_lessons_function_passes(exercise: Exercise) -> None:
    check(exercise, exercise.solution)


@pytest.mark.parametrize(("exercise", "hint", "mistake"), [
    (exercise, hint, mistake) for exercise in EXERCISES for hint, mistake in exercise.mistakes.items()], ids=names)
def test_a_typical_mistake_gets_its_hint(exercise: Exercise, hint: str, mistake: Callable) -> None:
    with pytest.raises(Wrong, match=re.escape(hint)):
        check(exercise, mistake)


def test_every_exercise_has_three_mistakes_and_is_listed() -> None:
    listed = (ROOT / "exercises" / "README.md").read_text()
    for exercise in EXERCISES:
        assert len(exercise.mistakes) >= 3 and f"`{exercise.name}`" in listed, exercise.name


def test_other_mistakes_are_told_what_differs() -> None:
    by_name = {exercise.name: exercise for exercise in EXERCISES}
    for name, answer, said in (
        ("v_target", lambda *a: None, "a NoneType came back, a tensor is wanted"),
        ("as_clips", lambda z, frames: z, r"the shape is \(6, 4, 2, 3\), \(2, 4, 3, 6\) is wanted"),
        ("guide", lambda u, c, s: u + s * (c - u) + 0.1, "scale 0: the values are off by up to 0.1"),
        ("attend_over_frames", lambda attend, z, frames: z, "are frames in the batch axis"),
        ("masked_context", lambda z, mask: z / 0, "number of channels: 2 was found, 3 is wanted"),
        ("long_prediction", lambda predict, first, count: predict(first), "raises ValueError: predict was given"),
    ):
        with pytest.raises(Wrong, match=said):
            check(by_name[name], answer)
