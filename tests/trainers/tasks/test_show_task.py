"""`python -m trainers.tasks`: what a person sees of a task.

python -m pytest tests/trainers/tasks/test_show_task.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from tests.trainers.tasks.test_check import FOUR, GEN, MC, row, say, write
from trainers.tasks.__main__ import main


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_a_task_is_shown_with_sizes_prompts_lengths_and_notes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [row(1, ["ruby", "o" * 30]), *FOUR]
    out = shown(capsys, str(write(tmp_path, MC, rows, FOUR)), "select_on=test", "max_length=40", "prompts=2")
    assert "5 rows to train on (quiz 5); accuracy on quiz (4 × acc)" in out
    assert "a training row is trained on the text between ▸ and ◂" in out
    assert "chance: 0.250" in out
    assert "task 'quiz', split 'train', row 0 (train.jsonl, line 1)\n" in out
    assert f"ich is ruby ?▸ {'o' * 30}◂" not in out  # the row's beginning is cut off
    assert f"▸ {'o' * 30}◂" in out
    assert "which is ruby ?▸ reed◂" in out
    assert "▸ opal◂" not in out  # two prompts, far apart
    assert "tokens of 5 training rows of quiz\n        20-23        4  ████" in out
    assert "\n        44-46        1  ██████████\n" in out
    assert "tokens of 16 sequences of quiz, test (evaluation)\n           20       16  " in out
    assert "max_length 40; tiny-moe has 512 positions" in out
    assert "note: 1 of 5 training rows of 'quiz' are cut" not in out
    assert "note: 1 of 5 training rows of 'quiz' is cut to max_length=40\n" in out


def test_a_written_answer_has_no_chance(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = shown(capsys, f"task={write(tmp_path, GEN, say('a', 'b'), say('c'))}", "select_on=test")
    assert "chance: none, the model writes its answers" in out
    assert "  q0 :▸a<eos>◂" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_task"], "unknown task 'no_such_task'"),
        (["tiny_pairs", "tiny_cipher"], "task=tiny_pairs,tiny_cipher"),
        (["tiny_pairs", "task=tiny_cipher"], "one task"),
        (["tiny_pairs", "modle=tiny-moe"], "did you mean 'model'?"),
        (["tiny_pairs", "limit=x"], "limit must be a whole number"),
        (["tiny_pairs", "model=tiny-mo"], "did you mean 'tiny-moe'"),
    ],
)
def test_bad_words_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(StudyError) as error:
        main(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"lr": 0.1}, "unknown recipe setting 'lr'; did you mean 'recipe.learning_rate'?"),
        ({"rank": 0}, "recipe.rank must be at least 1"),
        ({"max_length": "long"}, "recipe.max_length must be a whole number, got 'long'"),
    ],
)
def test_a_recipe_that_a_study_would_refuse_is_refused(tmp_path: Path, recipe: dict[str, object], said: str) -> None:
    path = write(tmp_path, GEN, say("a"), say("c"), metadata={"recipe": recipe})
    with pytest.raises(StudyError, match="suggests what no recipe has: ") as error:
        main([str(path), "select_on=test"])
    assert said in str(error.value)


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "help")
    assert "python -m trainers.tasks" in out
    assert "model (tiny-moe)" in out
