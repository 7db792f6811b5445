"""The command line of the server."""

import argparse
import socket

import pytest

from speechlm2_jax.cli import main as command_line
from speechlm2_jax.inference.long_form.chunks import DEFAULT_MAX_AUDIO_S
from speechlm2_jax.serving import arguments, common_arguments
from speechlm2_jax.serving.common_arguments import KEY_VARIABLE
from speechlm2_jax.serving.load import NO_ALIGNER, as_trained, open_named_aligner
from speechlm2_jax.serving.options import MAX_AUDIO_S, PROMPT, ServeOptions
from speechlm2_jax.settings import SettingsError


def options(*argv):
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    return arguments.read_options(parser.parse_args(argv))


def test_what_is_left_out_has_the_defaults_of_the_settings(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert options("runs/salm") == ServeOptions(model="runs/salm")
    assert options("runs/salm/").served_name == "salm"


def test_arguments_and_keys_of_the_environment_are_read(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "b, c")
    own = options("m", "--api-key", "a", "--port", "1", "--max-body-mib", "0.5", "--max-queue", "0")
    assert own.api_keys == ("a", "b", "c") and own.port == 1 and own.max_queue == 0
    assert own.max_body_bytes == 1 << 19


def test_a_value_that_cannot_be_is_one_line(capsys):
    assert command_line(["serve", "runs/salm", "--slots", "0"]) == 2
    assert capsys.readouterr().err == "serve: --slots=0: must be positive\n"


def test_a_misspelt_run_is_told_before_the_server_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "salm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert command_line(["serve", "runs/slam"]) == 2
    text = "serve: MODEL: no such run: 'runs/slam'; did you mean 'runs/salm'?\n"
    assert capsys.readouterr().err == text
    assert command_line(["serve", "./none"]) == 2
    assert capsys.readouterr().err == "serve: MODEL: no such file or directory: './none'\n"


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command_line(["serve", str(tmp_path), "--port", str(port)]) == 2
    text = f"serve: port {port} of 127.0.0.1 is in use; take another with --port\n"
    assert capsys.readouterr().err == text
    common_arguments.check_before_start(ServeOptions(model=str(tmp_path), port=port))


WRONG = {
    "--max-body-mib=0": "--max-body-mib=0.0: must be positive",
    "--max-body-mib=inf": "--max-body-mib=inf: must be a finite number",
    "--request-timeout-s=nan": "--request-timeout-s=nan: must be a finite number",
    "--max-queue=-1": "--max-queue=-1: must be 0 or more",
    "--port=70000": "--port=70000: must be at most 65535",
    "--api-key=": "--api-key: a key is empty",
    "--api-key= ": "--api-key: a key is empty",
}


@pytest.mark.parametrize("given", WRONG)
def test_wrong_values_are_told_by_the_name_of_the_argument(given):
    with pytest.raises(ValueError, match=f"^{WRONG[given]}"):
        options("m", given)


@pytest.mark.parametrize("value", ["", " ", "a,", "a,,b"])
def test_a_variable_with_an_empty_key_opens_no_server(value, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(ValueError, match=f"^{KEY_VARIABLE} has an empty key"):
        options("m")


OPEN = {"127.0.0.1": False, "::1": False, "localhost": False, "0.0.0.0": True, "": True, "h": True}


@pytest.mark.parametrize("host", OPEN)
def test_an_address_of_others_without_a_key_is_open(host):
    assert ServeOptions(model="m", host=host).is_open == OPEN[host]
    assert not ServeOptions(model="m", host=host, api_keys=("a",)).is_open


def test_what_is_not_given_is_as_in_training(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data: {train_ds: {max_duration: 5.0, input_cfg: [{tags: {context: 'Write:'}}]}}"
    )
    own = as_trained(ServeOptions(model=str(tmp_path)))
    assert (own.prompt, own.max_audio_s) == ("Write:", 5.0)
    given = ServeOptions(model=str(tmp_path), prompt="Repeat:", max_audio_s=2.0)
    assert as_trained(given) == given
    other = as_trained(ServeOptions(model=str(tmp_path / "none")))
    assert (other.prompt, other.max_audio_s) == (PROMPT, MAX_AUDIO_S)
    assert MAX_AUDIO_S == DEFAULT_MAX_AUDIO_S


def test_an_aligner_is_named_or_none_and_a_wrong_one_is_told(tmp_path):
    assert options("m", "--aligner", "none").aligner == NO_ALIGNER
    assert open_named_aligner(NO_ALIGNER) is None
    with pytest.raises(SettingsError, match="--aligner"):
        open_named_aligner(str(tmp_path / "a.nemo"))


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit):
        command_line(["serve", "--help"])
    text = capsys.readouterr().out
    assert "--max-new-tokens" in text and "usage: speechlm2-jax serve" in text
