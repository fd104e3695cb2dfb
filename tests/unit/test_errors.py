"""How a mistake is told, by amrlhf and by the tools alike."""

from megatron_amrlhf.errors import UserError, tells_user_errors


@tells_user_errors
def tool():
    raise UserError("a.yaml: malformed\n  at line 3")


def test_a_tool_tells_a_mistake_of_several_lines_in_one(capsys):
    assert tool() == 2
    assert capsys.readouterr().err == "error: a.yaml: malformed at line 3\n"
