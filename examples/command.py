"""What the programs' command lines have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags


def flag_parser(program: str) -> Callable[[list[str]], list[str]]:
    """Returns a parser of the command line, for which a wrong flag is one line, as is all bad input."""

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            print(f"{program}: {' '.join(str(error).split())} (--help shows all flags)", file=sys.stderr)
            sys.exit(2)

    return parse_flags
