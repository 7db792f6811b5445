"""Reading settings: what is accepted, and the exact line a user reads when something is not."""

from pathlib import Path
from typing import Any

import pytest

from speechlm2_jax import settings
from speechlm2_jax.settings import SettingsError, read


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SettingsError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("10", 10),
        ("1_000", 1000),
        ("-1", -1),
        ("010", "010"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("01:02:03:04", "01:02:03:04"),
        ("10:30", "10:30"),
        ("2024-01-01", "2024-01-01"),
        ("True", True),
        ("off", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3e-4'", "3e-4"),
        ("[-1, 1e-3]", [-1, 1e-3]),
    ],
)
def test_yaml_scalars_read_as_the_values_people_mean(text, value):
    read = settings.parse_yaml(f"key: {text}")["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "key: !!python/object/apply:os.system ['echo']",
        "key: !!python/name:os.system",
        "key: !!binary aGVsbG8=",
        "key: !!set {a}",
        "key: !!timestamp 2024-01-01",
        "key: [1",
        "<<: {a: 1}",
        "!!merge x: {a: 1}",
        "1: a",
        "a: 1\na: 2",
        "a: &x [*x]",
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(text):
    message(settings.parse_yaml, text)


@pytest.fixture
def small_limit(monkeypatch):
    """The bound is on work done, so a smaller one shows it sooner."""
    monkeypatch.setattr(read, "MAX_NODES", 2_000)


@pytest.mark.usefixtures("small_limit")
def test_an_alias_bomb_is_refused_without_expanding():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 30):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    assert "expands to more than 50000 values" in message(settings.parse_yaml, "\n".join(lines))


@pytest.mark.usefixtures("small_limit")
def test_an_interpolation_bomb_is_refused_without_expanding():
    values = {"a0": "x" * 100} | {f"a{i}": f"${{a{i - 1}}}" * 10 for i in range(1, 40)}
    assert "expands to more than 50000 values" in message(settings.resolve, values)


def test_deep_nesting_is_refused():
    assert message(settings.parse_yaml, "[" * 1000 + "]" * 1000) == "nested too deeply"


def test_a_file_of_a_hundred_thousand_targets_is_refused(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("\n".join(f"k{i}: {{_target_: os.system}}" for i in range(50_000)))
    assert "not a settings file" in message(settings.load, path)


def test_interpolation_follows_paths_siblings_and_environment(monkeypatch):
    monkeypatch.setenv("SLM_TEST_ROOT", "/corpus")
    values = {
        "trainer": {"max_steps": 10, "bins": [1, 2]},
        "model": {
            "steps": "${trainer.max_steps}",
            "text": "at ${trainer.max_steps}/${.tag}",
            "tag": "t",
            "inner": {"up": "${..tag}", "bins": "${trainer.bins}", "first": "${trainer.bins[0]}"},
        },
        "path": "${oc.env:SLM_TEST_ROOT}/a",
        "other": "${oc.env:SLM_TEST_UNSET,fallback}",
        "which": "trainer",
        "nested": "${${which}.max_steps}",
        "pattern": "^llm\\..+$",
    }
    resolved = settings.resolve(values)
    assert resolved["model"] == {
        "steps": 10,
        "text": "at 10/t",
        "tag": "t",
        "inner": {"up": "t", "bins": [1, 2], "first": 1},
    }
    assert resolved["path"] == "/corpus/a"
    assert resolved["other"] == "fallback"
    assert resolved["nested"] == 10
    assert resolved["pattern"] == "^llm\\..+$"


def test_interpolation_that_leads_nowhere_names_both_paths():
    assert message(settings.resolve, {"a": {"b": "${c.d}"}}) == "a.b: ${c.d}: there is no 'c.d'"
    loop = message(settings.resolve, {"a": "${b}", "b": "${a}"})
    assert "refers to itself" in loop
    assert "only oc.env" in message(settings.resolve, {"a": "${eval:1+1}"})
    assert "is not set" in message(settings.resolve, {"a": "${oc.env:SLM_TEST_UNSET}"})
    assert "single value" in message(settings.resolve, {"a": "x${b}", "b": [1]})


# ------------------------------------------------------------------ overrides


def test_overrides_set_add_and_delete():
    values = {"a": {"b": 1, "list": [{"c": "???"}]}, "gone": 1, "empty": None}
    result = settings.override(
        values,
        [
            "a.b=3e-4",
            "a.list.0.c=x.json",
            "+a.new.deep=[1, 2.5, null]",
            "++a.b=2e-4",
            "~gone",
            "+empty.key=",
            "+text=Transcribe: this #1",
            "+lora={r: 8}",
            "+lora={alpha: 16}",
        ],
    )
    assert result == {
        "a": {"b": 2e-4, "list": [{"c": "x.json"}], "new": {"deep": [1, 2.5, None]}},
        "empty": {"key": ""},
        "text": "Transcribe: this #1",
        "lora": {"r": 8, "alpha": 16},
    }
    assert values["a"]["b"] == 1, "the given mapping is not changed"


def test_an_override_of_an_unknown_key_names_the_nearest():
    values = {"trainer": {"max_steps": 1}, "list": [1]}
    assert message(settings.override, values, ["trainer.max_stepz=2"]) == (
        "trainer.max_stepz: unknown key; did you mean 'max_steps'? (+trainer.max_stepz= adds a key)"
    )
    assert message(settings.override, values, ["trainr.max_steps=2"]) == (
        "trainr: unknown key; did you mean 'trainer'? (+trainr= adds a key)"
    )
    assert message(settings.override, values, ["list.3=2"]) == (
        "list.3: expected an index below 1, got '3'"
    )
    assert message(settings.override, values, ["trainer.max_steps.x=2"]) == (
        "trainer.max_steps.x: trainer.max_steps is 1 (int), which has no keys"
    )
    assert "unknown key" in message(settings.override, values, ["~trainer.nothing"])
    assert "expected key=value" in message(settings.override, values, ["trainer.max_steps"])


def test_missing_values_are_listed_with_their_paths(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: ???\nb:\n  - c: ???\n  - 1\nd: ${a}\n")
    assert message(settings.load, path) == "fill in a, b.0.c; for instance a=VALUE"
    filled = settings.load(path, ["a=1", "b.0.c=2"])
    assert filled == {"a": 1, "b": [{"c": 2}, 1], "d": 1}
    assert settings.load(path, complete=False)["d"] == "???"


def test_a_name_is_found_in_configs_and_recipes(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "salm.yaml").write_text("a: 1")
    (tmp_path / "recipes" / "canary.yaml").write_text("a: 2")
    assert settings.load("salm", search=(tmp_path,)) == {"a": 1}
    assert settings.load("salm.yaml", search=(tmp_path,)) == {"a": 1}
    assert settings.load("canary", search=(tmp_path,)) == {"a": 2}
    assert message(settings.load, "slam", search=(tmp_path,)) == (
        "no settings file 'slam'; did you mean 'salm'? give a path, or one of: canary, salm"
    )


def test_the_projects_own_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = Path(__file__).parents[1] / "configs"
    assert settings.find("digits") == configs / "recipes" / "digits.yaml"


def test_a_file_that_is_not_a_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("[1]")
    assert message(settings.load, path) == f"{path}: expected a mapping of keys, got a list"


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("argv", "config", "overrides"),
    [
        (["--config", "salm", "a.b=1", "+c=2", "~d"], "salm", ["a.b=1", "+c=2", "~d"]),
        (["a=1", "--config=salm", "b=2"], "salm", ["a=1", "b=2"]),
        (["--config-name", "salm", "a=-1"], "salm", ["a=-1"]),
        (["-cn", "salm"], "salm", []),
    ],
)
def test_command_lines_in_our_words_and_hydras(argv, config, overrides):
    assert settings.parse_cli(argv) == (config, overrides)


def test_config_path_and_name_join(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1")
    expected = (str(tmp_path / "mine.yaml"), ["a=2"])
    argv = ["--config-path", str(tmp_path), "--config-name", "mine", "a=2"]
    assert settings.parse_cli(argv) == expected
    assert settings.parse_cli([f"-cp={tmp_path}", "-cn=mine.yaml", "a=2"]) == expected


def test_a_command_may_name_its_first_file_without_a_flag():
    def parse(*argv):
        return settings.parse_settings(settings.settings_parser("x", ""), argv)[1]

    assert parse("salm", "a=1") == parse("a=1", "--config", "salm") == parse("-cn", "salm", "a=1")
    assert parse("salm", "~d", "--config", "b").over == ("b",)
    assert "expected key=value" in message(parse, "salm", "b")
    assert "name the settings: x --config" in message(parse, "a=1")


def test_command_line_mistakes_are_one_line():
    assert "name the settings" in message(settings.parse_cli, [])
    assert "name the settings with --config" in message(settings.parse_cli, ["salm"])
    assert "unrecognized arguments: --cfg" in message(settings.parse_cli, ["--cfg", "job"])
    assert "--config-path needs" in message(settings.parse_cli, ["-cp", "x"])
    assert settings.parse_cli([], default="salm") == ("salm", [])


def test_later_files_replace_values_of_the_first(tmp_path):
    (tmp_path / "first.yaml").write_text("a: {b: 1, c: [1, 2], d: '${a.b}'}\ne: 5")
    (tmp_path / "second.yaml").write_text("a: {b: 2, c: [3], n: {x: 1}}")
    (tmp_path / "third.yaml").write_text("a: {b: 3, n: null}")
    files = [str(tmp_path / f"{name}.yaml") for name in ("first", "second", "third")]
    command = settings.parse_train(["--config", files[0], "--config", files[1], "e=6"])
    assert (command.config, command.over, command.overrides) == (files[0], (files[1],), ["e=6"])
    found = settings.load(command.config, command.overrides, over=command.over)
    assert found == {"a": {"b": 2, "c": [3], "d": 2, "n": {"x": 1}}, "e": 6}
    assert settings.load(files[0], over=files[1:])["a"] == {"b": 3, "c": [3], "d": 3, "n": None}
    named = settings.parse_train(["-cp", str(tmp_path), "-cn", "first", "--config", files[1]])
    assert (named.config, named.over) == (files[0], (files[1],))
    two = ["--config", files[0], "--config", files[1]]
    assert "takes one file" in message(settings.parse_cli, two)


def test_help_shows_every_way_to_say_it(capsys):
    with pytest.raises(SystemExit) as end:
        settings.parse_cli(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--config ", "--config-name", "-cp", "key=value"))


def test_train_takes_a_dry_run_beside_the_same_words():
    command = settings.parse_train(["a=1", "--config", "salm", "--dry-run"])
    assert command == settings.TrainCommand(config="salm", overrides=["a=1"], dry_run=True)
    assert not settings.parse_train(["-cn", "salm"]).dry_run


def test_from_names_the_weights_to_start_from():
    command = settings.parse_train(["a=1", "--config", "salm", "--from", "runs/salm"])
    assert command.overrides == ["a=1", "++model.init_from_checkpoint=runs/salm"]
    assert "unrecognized arguments: --dry-run" in message(
        settings.parse_cli, ["--config", "salm", "--dry-run"]
    )
