import typer

from nbdserve.cli.usage import UsageError


def test_what_typer_raises_for_a_bad_command_line_is_caught() -> None:
    assert issubclass(typer.BadParameter, UsageError)
    assert not issubclass(UsageError, typer.BadParameter)
    assert UsageError("text").format_message() == "text"
