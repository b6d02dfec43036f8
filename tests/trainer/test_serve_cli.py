"""`planaria serve` says what is wrong before it serves."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from trainer.cli import main


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", "anywhere"]) == 2
    error = capsys.readouterr().err
    assert "planaria serve needs uvicorn" in error
    assert "pip install fastapi uvicorn" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "'70000' is no port"),
        (["--port", "-1"], "'-1' is no port"),
        (["--max-queue", "0"], "not a whole number above 0"),
        (["--drain-seconds", "soon"], "no number of seconds"),
        (["--expert-budget", "2"], "not a number from 0 to 1"),
        (["--adapter", "folder"], "is not NAME=DIR"),
        (["--adapter", "a:b=folder"], "is not NAME=DIR"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "anywhere", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "two words", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused(key, monkeypatch, capsys):
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    assert main(["serve", "anywhere", "--api-key", key]) == 2
    monkeypatch.setenv("PLANARIA_API_KEY", key)
    assert main(["serve", "anywhere"]) == 2
    assert capsys.readouterr().err.count("a key is visible ASCII characters") == 2


def test_a_port_in_use_is_said_before_the_model_is_opened(capsys):
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-folder", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-folder"], "no-such-folder"),
        (["no-such-folder", "--adapter", "a=x", "--adapter", "a=y"], "two adapters have one name"),
        (["no-such-folder", "--chat-template", "no-such-file"], "no-such-file"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_a_sentence(arguments, said, capsys):
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    assert main(["serve", "--port", "0", *arguments]) == 2
    assert said in capsys.readouterr().err
