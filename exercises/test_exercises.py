"""python -m pytest exercises: checks what has been written so far, and skips what has not."""

from importlib import import_module

import pytest

from exercises.checks import EXERCISES, Exercise, check


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: f"{exercise.lesson}-{exercise.name}")
def test_exercise(exercise: Exercise) -> None:
    __tracebackhide__ = True
    function = getattr(import_module(f"exercises.{exercise.lesson}"), exercise.name)
    try:
        check(exercise, function)
    except NotImplementedError:
        pytest.skip(f"not written yet: exercises/{exercise.lesson}.py")
    except AssertionError as error:
        pytest.fail(str(error), pytrace=False)
