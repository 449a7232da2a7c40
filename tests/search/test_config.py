"""The command line: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest

from allocators.core.errors import StudyError
from allocators.core.types import Recipe
from search.config import AUTO, Decides, RunConfig, Where, _key, help_text, keys, load_arguments, parse
from search.records.reuse import INDIFFERENT
from search.replay import Table
from trainers import models, tasks
from trainers.recipes import make_recipe


def test_no_words_give_the_defaults() -> None:
    assert parse([]) == RunConfig()


def test_words_become_typed_values_in_their_group() -> None:
    config = parse(
        ["space=sieve", "trials=3", "recipe.rank=4", "recipe.learning_rate=1e-3", "space.fraction=0.5", "dry_run=true"]
    )
    assert (config.space, config.trials, config.dry_run) == ("sieve", 3, True)
    assert config.recipe == {"rank": 4, "learning_rate": 1e-3}
    assert config.pins == {"fraction": 0.5}


def test_seeds_may_be_left_to_the_sampler(tmp_path: Path) -> None:
    config = parse(["seeds=auto"])
    assert config.seeds == AUTO
    assert "seeds=auto" in config.command()
    file = tmp_path / "settings.yaml"
    file.write_text("seeds: auto\n")
    assert parse([f"config={file}"]) == config
    assert parse(config.command().split()[3:]) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trails=3"], "unknown key 'trails'; did you mean 'trials'?"),
        (["trials"], "'trials' is not key=value"),
        (["trials=many"], "trials must be a whole number, got 'many'"),
        (["trials=0"], "trials must be at least 1, got 0"),
        (["seeds=0"], "seeds must be at least 1, got 0"),
        (["recipe.rnk=3"], "did you mean 'rank'?"),
        (["recipe.rank=big"], "recipe.rank must be a whole number, got 'big'"),
        (["recipe.rank=0"], "rank must be at least 1, got 0"),
        (["recipe.schedule=cos"], "schedule must be cosine, linear or constant"),
        (["sampler=tp"], "choose from ehvi, gp, nsga2, random, tpe; did you mean 'tpe'?"),
        (["time_budget=soon"], "time_budget must look like 90s, 10m or 2h, got 'soon'"),
        (["config=nowhere.yaml"], "config=nowhere.yaml: there is no such file"),
        (["keep=none"], "unknown keep 'none': choose from all, front"),
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
        (["gradient_checkpointing=perhaps"], "gradient_checkpointing must be true or false, got 'perhaps'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_possible(words: list[str], said: str) -> None:
    with pytest.raises(StudyError) as error:
        parse(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_read_first_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("trials: 5\nseed: 7\nrecipe: {rank: 4, steps: 10}\npins: {fraction: 0.5}\n")
    config = parse([f"config={file}", "trials=9", "recipe.rank=8"])
    assert (config.trials, config.seed) == (9, 7)
    assert config.recipe == {"rank": 8, "steps": 10}
    assert config.pins == {"fraction": 0.5}


def test_a_typo_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("trails: 5\n")
    with pytest.raises(StudyError, match=r"unknown key 'trails' in .*study\.yaml; did you mean 'trials'"):
        parse([f"config={file}"])


def test_the_command_of_a_study_parses_back_to_the_same_study() -> None:
    words = ["space=sieve", "trials=3", "recipe.rank=4", "space.score=mass", "time_budget=5m", "plugins=[a.py,b.py]"]
    config = parse(words)
    again = parse(shlex.split(config.command())[3:])
    assert again == config


def test_several_tasks_are_a_list_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
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


def test_what_changes_results_makes_another_study_and_what_does_not_goes_on() -> None:
    same, default = parse(["gradient_checkpointing=true", "trials=40"]), RunConfig().identity()
    assert same.identity() == default
    of_the_model = ("dtype=float16", "attn=eager", "quantization=nf4", "trust_remote_code=true", "model=tiny-dense")
    of_the_task = ("training_limit=9", "metric=acc_norm", "num_fewshot=0", "fewshot_seed=1", "chat_template=true")
    for word in (*of_the_model, *of_the_task, "task=[piqa,boolq]"):
        key = word.partition("=")[0]
        own_task = {"task"} if key == "model" else set()  # tiny-dense has a default task of its own
        assert {k for k, v in parse([word]).identity().items() if v != default[k]} == {key} | own_task


def test_every_key_says_what_it_decides_and_which_part_of_the_program_takes_it() -> None:
    for f in fields(RunConfig):
        assert f.metadata["decides"] in get_args(Decides), f.name
        assert f.metadata["where"] in get_args(Where), f.name
    with pytest.raises(TypeError, match="decides"):
        _key(0, "a key that does not say what it decides", where="search")  # type: ignore[call-arg]  # on purpose


def test_what_follows_from_the_table_is_what_was_kept_by_hand() -> None:
    """A key that moves from one list to another resumes, reuses or replays other studies than before."""
    proposals = {"space", "seed", "plugins", "recipe", "pins", "calibration_samples", "scheduler", "eta"}
    proposals |= {"rank_by", "first_rung"}
    results = {"model", "task", "evaluations", "limit", "replay", "training_limit", "metric", "num_fewshot"}
    results |= {"fewshot_seed", "chat_template", "dtype", "attn", "quantization", "trust_remote_code"}
    results |= {"select_on", "held_out", "forgetting"}
    assert set(RunConfig().identity()) == proposals | results
    assert proposals == INDIFFERENT == set(keys(decides="proposals"))
    table = Table("t", {"identity": RunConfig().identity()}, {})
    assert set(table.settings) == results | {"space", "calibration_samples"}
    of_the_model = {"dtype", "attn", "gradient_checkpointing", "quantization", "trust_remote_code", "shard"}
    of_the_task = {"limit", "training_limit", "metric", "num_fewshot", "fewshot_seed", "chat_template"}
    of_the_task |= {"select_on", "held_out"}
    assert set(RunConfig().options("model")) == of_the_model
    assert set(RunConfig().options("task")) == of_the_task
    assert of_the_model == signature(models.load).parameters.keys() - {"name", "device"}
    assert of_the_task < signature(tasks.load_task).parameters.keys()
    assert set(keys(where="model", decides="running")) == {"gradient_checkpointing", "shard"}
    assert set(keys(where="machine")) == {
        "storage",
        "lock",
        "tracking_uri",
        "ray_address",
        "num_cpus",
        "max_concurrent",
        "workers",
        "wait_for_workers",
    }
    amount = {"trials", "seeds", "time_budget", "max_trainable_params", "deployable", "dry_run", "estimate"}
    assert set(keys(where="amount")) == amount
    changed = parse(["trials=3", "seeds=2", "time_budget=1h", "max_trainable_params=9", "dry_run=true", "limit=4"])
    assert changed.without("amount") == parse(["limit=4"])


def test_a_study_says_how_to_load_what_it_trained_on() -> None:
    settings = {"dtype": "bfloat16", "attn": "auto", "gradient_checkpointing": True, "trials": 3}
    assert load_arguments(settings) == {"dtype": "bfloat16"}
    assert load_arguments({"quantization": "int8"}) == {"quantization": "int8"}
    defaults = {name: p.default for name, p in signature(models.load).parameters.items()}
    assert RunConfig().options("model").items() <= defaults.items()


@pytest.mark.parametrize("text", ["007", "1e3", "1.10", "on", "1_000", "null", "{a", "*x", "%41", "a\tb", '"q"', "a=b"])
def test_text_stays_as_it_was_typed(text: str, tmp_path: Path) -> None:
    for key in (
        "model",
        "storage",
        "metric",
        "tracking_uri",
        "replay",
        "space",
        *(["name"] if text.isprintable() else []),
    ):
        config = parse([f"{key}={text}"])
        assert getattr(config, key) == text
        assert parse(shlex.split(config.command())[3:]) == config
    assert parse([f"plugins={text}"]).plugins == [text.strip('"')]
    file = tmp_path / "study.yaml"
    file.write_text(f"metric: {json.dumps(text)}\n")
    assert parse([f"config={file}"]).metric == text


def test_a_command_is_quoted_for_a_shell() -> None:
    for folder in ("DIR/it's 100% #1 & co", "a b", "$(x)", 'say "hi"', "ends in \\", "two\nlines", "[1]", "~/x", "*"):
        config = parse([f"storage={folder}", f"metric={folder}", 'plugins=["a,b.py","c d.py"]', "recipe.rank=4"])
        assert config.storage == folder
        assert config.plugins == ["a,b.py", "c d.py"]
        out = subprocess.run(["sh", "-c", f"printf '%s\\0' {config.command()}"], capture_output=True, check=True).stdout
        assert parse(out.decode().split("\0")[3:-1]) == config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("trials=1_000", 1000),
        ("trials=+3", 3),
        ("gpus_per_worker=.25", 0.25),
        ("gpus_per_worker=2e-1", 0.2),
        ("reuse=True", True),
        ("reuse=FALSE", False),
        ("num_fewshot=-1", -1),
        ("recipe.learning_rate=3e-4", 3e-4),
        ("recipe.steps=1_000", 1000),
        ("space.fraction=.25", 0.25),
        ("space.flag=True", True),
        ("space.name=007", "007"),
        ("space.name=on", "on"),
    ],
)
def test_one_reading_of_numbers_and_switches(word: str, value: Any) -> None:
    key, _, name = word.partition("=")[0].partition(".")
    config = parse([word])
    read = {"recipe": config.recipe, "space": config.pins}[key][name] if name else getattr(config, key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "word",
    [
        *("trials=1e400", "trials=1.5", "trials=0x10", "trials=", "trials=" + "9" * 5000, "trials=1:30", "seed=-1"),
        *("gpus_per_worker=inf", "gpus_per_worker=nan", "gpus_per_worker=1e400", "gpus_per_worker=-2"),
        *("reuse=yes", "reuse=on", "reuse=1", "num_fewshot=-2", "pack=1e-9", "pack=" + "9" * 5000, "time_budget=٣s"),
        *("recipe.steps=inf", "recipe.rank=nan", "recipe.learning_rate=1e400", "recipe.weight_decay=-1"),
        *("recipe.lora_alpha=0", "recipe.max_grad_norm=-1", "recipe.balance_coef=-.1", "recipe.epochs=-1"),
        *("recipe.lora_dropout=nan", "recipe.steps=" + "9" * 400, "recipe.rank=null", "recipe.rank=true"),
        *("pins={a: 1}", "recipe=rank", "time_budget=" + "9" * 400, "seed=4294967296", "seed=" + "9" * 400),
        *("trials=10000000000000000", "seeds=10001", "gpus_per_worker=1e300", "name=" + "a" * 300, "name=\udcff"),
        *("storage=a\0b", "metric=\udcff", "time_budget=1e3", "reuse=", "reuse=٣", "dry_run=2", "pack=٣", "pack="),
        *("name=../up", "name=.", "name=..", "name=a/b", "name=/absolute", "name=two\nlines", "name=a\tb"),
        *("name=.mlflow.db.lock", "name=signals"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_with_its_key(word: str) -> None:
    with pytest.raises(StudyError) as error:
        parse([word])
    assert word.partition("=")[0] in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_a_key_is_given_once() -> None:
    for words in (["trials=3", "trials=3"], ["space.x=1", "space.x=2"], ["recipe.rank=1", "task=a", "recipe.rank=1"]):
        with pytest.raises(StudyError, match=f"{words[-1].partition('=')[0]} is given twice"):
            parse(words)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: caf\xe9\n", "cannot be read"),
        (b"\xff\xfen\x00a\x00", "must hold key: value lines"),
        (b"recipe: {steps: [1]}\n", "recipe.steps must be a whole number, got '[1]'"),
        (b"trials: {a: 1}\n", "trials must be a value or a list of values"),
        (b"trials: {}\n", "trials must be a value or a list of values"),
        (b"pins: {x: {}}\n", "space.x must be a value or a list of values"),
        (b"plugins: [[a]]\n", "plugins must be a value or a list of values"),
        (b"name: !!null ''\n", "null is no tag that is read"),
        (b"name: !!binary aGk=\n", "binary is no tag that is read"),
        (b"name: !mine 3\n", "mine is no tag that is read"),
        (b"recipe: {rank: 4}\nrecipe.rank: 5\n", "gives recipe.rank twice"),
        (b"pins: {rank: 4}\nspace.rank: 5\n", "gives space.rank twice"),
        (b"recipe: {rank: 4, rank: 5}\n", "rank is given twice"),
        (b"recipe: {<<: {rank: 4}, <<: {steps: 5}}\n", "<< is given twice"),
        (b'storage: "a\\0b"\n', "storage in"),
        (b'metric: "\\ud800"\n', "metric in"),
        (b"x" * (1 << 21), "larger than 1 MiB"),
        (b"[" * 1000, "cannot be read"),
        (b"trials: 3\n---\ntrials: 4\n", "cannot be read"),
        (b"trials: \x07\n", "cannot be read"),
        (b"trials: 3\ntrials: 4\n", "trials is given twice"),
        (b"trials: !!python/object:os.system {}\n", "cannot be read"),
        (b"pins: 3\n", "pins in"),
        (b"recipe: {learning_rate: .inf}\n", "recipe.learning_rate must be a finite number"),
        (b"a: &a [*a]\n", "a must be a value or a list of values"),
        (b"a: &a {<<: *a}\n", "a must be a value or a list of values"),
        (b"- trials\n", "must hold key: value lines"),
        (b"? [a]\n: b\n", "cannot be read"),
        (b"a: b: c\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(StudyError) as error:
        parse([f"config={file}"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_read_as_the_command_line_is(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: ???\nstorage: ${b}\nplugins: own.py\nrecipe: {learning_rate: 3e-4}\npins: {a: '8', b: 8}\n")
    config = parse([f"config={file}"])
    assert (config.name, config.storage, config.plugins) == ("???", "${b}", ["own.py"])
    assert config.recipe == {"learning_rate": 3e-4}
    assert config.pins == {"a": "8", "b": 8}
    file.write_text("trials: 7\n", encoding="utf-16")
    assert parse([f"config={file}"]).trials == 7
    file.write_text("recipe: &b {rank: 4}\npins: {<<: *b, fraction: 0.5}\n")
    assert parse([f"config={file}"]).pins == {"rank": 4, "fraction": 0.5}


def test_help_names_every_key_with_its_meaning() -> None:
    text = help_text()
    for f in fields(RunConfig):
        assert f.name in text
        assert f.metadata["help"].split()[0] in text


def test_later_layers_of_a_recipe_win_and_epochs_replace_earlier_steps() -> None:
    assert make_recipe({"rank": 4, "steps": 80}, {"rank": 16}) == Recipe(rank=16, steps=80)
    assert make_recipe({"steps": 80}, {"epochs": 2}) == Recipe(steps=0, epochs=2.0)
    assert make_recipe({"epochs": 2, "steps": 80}).steps == 80
