"""The command line: what is taken, what is refused, and in which words."""

from __future__ import annotations

import pytest

from allocators.core.errors import StudyError
from allocators.core.types import Recipe
from search.config import RunConfig, help_text, make_recipe, parse


def test_no_words_give_the_defaults():
    assert parse([]) == RunConfig()


def test_words_become_typed_values_in_their_group():
    config = parse(
        ["space=sieve", "trials=3", "recipe.rank=4", "recipe.learning_rate=1e-3", "space.fraction=0.5", "dry_run=true"]
    )
    assert (config.space, config.trials, config.dry_run) == ("sieve", 3, True)
    assert config.recipe == {"rank": 4, "learning_rate": 1e-3}
    assert config.pins == {"fraction": 0.5}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trails=3"], "unknown key 'trails'; did you mean 'trials'?"),
        (["trials"], "'trials' is not key=value"),
        (["trials=many"], "trials: "),
        (["trials=0"], "trials must be at least 1, got 0"),
        (["seeds=0"], "seeds must be at least 1, got 0"),
        (["recipe.rnk=3"], "did you mean 'rank'?"),
        (["recipe.rank=big"], "recipe.rank must be a whole number, got 'big'"),
        (["recipe.rank=0"], "rank must be at least 1, got 0"),
        (["recipe.schedule=cos"], "schedule must be cosine, linear or constant"),
        (["sampler=tp"], "choose from ehvi, nsga2, random, tpe; did you mean 'tpe'?"),
        (["time_budget=soon"], "time_budget must look like 90s, 10m or 2h, got 'soon'"),
        (["config=nowhere.yaml"], "config=nowhere.yaml: there is no such file"),
        (["keep=none"], "keep must be front or all, got 'none'"),
        (
            ["dtype=bf16"],
            "unknown dtype 'bf16': choose from auto, bfloat16, float16, float32; did you mean 'bfloat16'?",
        ),
        (["attn=flash_attention2"], "did you mean 'flash_attention_2'?"),
        (["shard=true"], "workers_per_trial is 1: set it to 2 or more, or leave shard out"),
        (["shard=true", "workers_per_trial=2", "quantization=nf4"], "do not go together"),
        (["pack=0"], "pack must be auto or at least 1, got 0"),
        (["pack=some"], "pack must be auto or at least 1, got some"),
        (["pack=4", "workers_per_trial=2"], "pack=4 and workers_per_trial=2"),
        (["pack=2", "gradient_checkpointing=true"], "pack=2 and gradient_checkpointing=true do not go together"),
        (["quantization=nf5"], "unknown quantization 'nf5': choose from int8, nf4; did you mean 'nf4'?"),
        (["gradient_checkpointing=perhaps"], "gradient_checkpointing: "),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_possible(words, said):
    with pytest.raises(StudyError) as error:
        parse(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_read_first_and_the_command_line_wins(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("trials: 5\nseed: 7\nrecipe: {rank: 4, steps: 10}\npins: {fraction: 0.5}\n")
    config = parse([f"config={file}", "trials=9", "recipe.rank=8"])
    assert (config.trials, config.seed) == (9, 7)
    assert config.recipe == {"rank": 8, "steps": 10}
    assert config.pins == {"fraction": 0.5}


def test_a_typo_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("trails: 5\n")
    with pytest.raises(StudyError, match=r"unknown key 'trails' in .*study\.yaml; did you mean 'trials'"):
        parse([f"config={file}"])


def test_the_command_of_a_study_parses_back_to_the_same_study():
    words = ["space=sieve", "trials=3", "recipe.rank=4", "space.score=mass", "time_budget=5m", "plugins=[a.py,b.py]"]
    config = parse(words)
    again = parse([word.strip("'") for word in config.command().split()[3:]])
    assert again == config


def test_several_tasks_are_a_list_on_the_command_line_and_in_a_file(tmp_path):
    config = parse(["task=[arc_easy, my/questions.yaml]"])
    assert config.task == "arc_easy,my/questions.yaml"
    assert config.study_name == "sieve-tiny-moe-arc_easy-questions"
    assert parse(config.command().split()[3:]) == config
    file = tmp_path / "study.yaml"
    file.write_text("task: [arc_easy, my/questions.yaml]\n")
    assert parse([f"config={file}"]) == config == parse(["task=arc_easy,my/questions.yaml"])
    assert parse([f"config={file}", "task=piqa"]).task == "piqa"
    with pytest.raises(StudyError, match="lacks a name"):
        parse(["task=[arc_easy,]"])


def test_what_changes_results_makes_another_study_and_what_does_not_goes_on():
    same, default = parse(["gradient_checkpointing=true", "trials=40"]), RunConfig().identity()
    assert same.identity() == default
    of_the_model = ("dtype=float16", "attn=eager", "quantization=nf4", "trust_remote_code=true", "model=tiny-dense")
    of_the_task = ("training_limit=9", "metric=acc_norm", "num_fewshot=0", "fewshot_seed=1", "chat_template=true")
    for word in (*of_the_model, *of_the_task, "task=[piqa,boolq]"):
        key = word.partition("=")[0]
        assert {k for k, v in parse([word]).identity().items() if v != default[k]} == {key}


def test_help_names_every_key_with_its_meaning():
    text = help_text()
    from dataclasses import fields

    for f in fields(RunConfig):
        assert f.name in text
        assert f.metadata["help"].split()[0] in text


def test_later_layers_of_a_recipe_win_and_epochs_replace_earlier_steps():
    assert make_recipe({"rank": 4, "steps": 80}, {"rank": 16}) == Recipe(rank=16, steps=80)
    assert make_recipe({"steps": 80}, {"epochs": 2}) == Recipe(steps=0, epochs=2.0)
    assert make_recipe({"epochs": 2, "steps": 80}).steps == 80
