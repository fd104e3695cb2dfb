"""How a mistake is told, by amrlhf and by the tools alike."""

import pytest

from megatron_amrlhf import cli
from megatron_amrlhf.errors import (
    UserError,
    error_line,
    printable,
    telling,
    tells_user_errors,
)
from megatron_amrlhf.interrupts import EXIT_INTERRUPTED


@tells_user_errors
def tool():
    raise UserError("a.yaml: malformed\n  at line 3")


def test_a_tool_tells_a_mistake_of_several_lines_in_one(capsys):
    assert tool() == 2
    assert capsys.readouterr().err == "error: a.yaml: malformed at line 3\n"


def test_a_folder_without_permission_is_told_by_its_name(capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "/d/heartbeat")

    assert tells_user_errors(refuse)() == 2
    monkeypatch.setitem(cli.VIEWERS, "status", refuse)
    assert cli.main(["status", "/d"]) == 2
    line = "error: [Errno 13] Permission denied: '/d/heartbeat'"
    assert capsys.readouterr().err.splitlines() == [line, line]


def test_an_error_does_not_steer_the_terminal():
    line = error_line(UserError("key '\x1b[31mred\x07' is\nunknown \u202e"))
    assert line == "error: key '\\x1b[31mred\\x07' is unknown \\u202e"
    assert printable("a\tb\n\u4f60") == "a\tb\n\u4f60"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("model.path: no such file", "SOURCE: no such file"),
        ("use another model.path.", "use another SOURCE."),
        ("reward_model.path: no head", "reward_model.path: no head"),
        ("/models/model.path/x: no such file", "/models/model.path/x: no such file"),
    ],
)
def test_a_tool_tells_its_own_argument_in_place_of_a_key(said, told):
    with pytest.raises(UserError) as caught, telling({"model.path": "SOURCE"}):
        raise UserError(said)
    assert str(caught.value) == told


def interrupted(*_):
    raise KeyboardInterrupt


def test_ctrl_c_is_no_traceback_of_a_tool():
    assert tells_user_errors(interrupted)() == EXIT_INTERRUPTED
