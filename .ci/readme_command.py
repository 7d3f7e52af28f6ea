"""Print one of the two commands at the top of the README: ``readme_command.py run|test``."""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def readme_command(name: str) -> str:
    """The command in the code block that follows the comment ``<!-- command: NAME -->``."""
    pattern = rf"<!-- command: {re.escape(name)} -->\n+```sh\n([^\n]+)\n```\n"
    found = re.findall(pattern, README.read_text(encoding="utf-8"))
    if len(found) != 1:
        raise SystemExit(f"README.md has {len(found)} commands called {name!r}, not one")
    return found[0]


if __name__ == "__main__":
    print(readme_command(sys.argv[1]))
