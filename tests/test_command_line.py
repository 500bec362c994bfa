from __future__ import annotations

import pytest

from dist_vlm.command_line import Parser, UsageError, run_command
from dist_vlm.config_fields import ConfigError


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="it", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    child = commands.add_parser("go", allow_abbrev=False)
    child.add_argument("--speed", required=True)
    commands.add_parser("stop", allow_abbrev=False).add_argument("--steep")
    return parser


def test_what_is_known_is_parsed(parser: Parser) -> None:
    assert vars(parser.parse(["go", "--speed", "3"])) == {"speed": "3"}
    assert parser.flags() == {"--help", "--speed", "--steep"}
    assert parser.flags(["go", "--speed", "3"]) == {"--help", "--speed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"the following arguments are required: COMMAND \(see it --help\)"),
        (["go"], r"the following arguments are required: --speed \(see it go --help\)"),
        (["go", "--sped", "3"], "unknown flag --sped; the nearest is --speed"),
        (["go", "--speed=3", "--x=secret"], "^unknown flag --x$"),
        (["stop", "--speed=3"], "^unknown flag --speed; the nearest is --steep$"),
        (["stop", "--speedometer=3"], "^unknown flag --speedometer$"),
        (["go", "--speed", "3", "on"], "^unknown argument on$"),
    ],
)
def test_what_is_not_is_named(parser: Parser, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parser.parse(words)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("bad words"), 2, "bad words"),
        (ConfigError("bad value"), 2, "bad value"),
        (ValueError("bad\n  run"), 1, "bad run"),
        (RuntimeError(), 1, "RuntimeError"),
        (OSError("no room"), 1, "no room"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error

    assert run_command(run) == status
    assert capsys.readouterr() == ("", f"dist-vlm: error: {said}\n")


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_run_says_its_own_status(returned: int | None, status: int) -> None:
    assert run_command(lambda: returned) == status
