"""How a mistake is told, by amrlhf and by the tools alike."""

import importlib

from megatron_amrlhf import __main__ as entry
from megatron_amrlhf.errors import EXIT_INTERRUPTED, UserError, tells_user_errors


@tells_user_errors
def tool():
    raise UserError("a.yaml: malformed\n  at line 3")


def test_a_tool_tells_a_mistake_of_several_lines_in_one(capsys):
    assert tool() == 2
    assert capsys.readouterr().err == "error: a.yaml: malformed at line 3\n"


def interrupted(*_):
    raise KeyboardInterrupt


def test_ctrl_c_is_no_traceback_of_a_tool_nor_while_the_command_line_loads(monkeypatch):
    assert tells_user_errors(interrupted)() == EXIT_INTERRUPTED
    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert entry.main() == EXIT_INTERRUPTED
