"""agvas-inspect: what a checkpoint, a bundle or a part holds, what does not fit, and what exporting it will take."""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all that is there fits, 1 when something is missing or unexpected, 2 when nothing could be told."""
    parser = argparse.ArgumentParser(prog="agvas-inspect", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="nano, a checkpoint, a bundle, or a part: a base, SAM's file, a training's folder")
    parser.add_argument("--json", action="store_true", help="last line of stdout as JSON")
    options = parser.parse_args(arguments)
    try:
        from agvas.contents import contents

        found = contents(options.path)
    except ModuleNotFoundError as error:
        print(f'agvas-inspect: {error.name} is not installed; pip install "agvas[export]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"agvas-inspect: {error}", file=sys.stderr)
        return 2
    for line in found.lines():
        print(line)
    if options.json:
        print(json.dumps(found.to_json()))
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
