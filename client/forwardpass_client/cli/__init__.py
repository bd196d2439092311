"""The command `forwardpass`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line. Its packages are not installed with the client."""
    try:
        from forwardpass_client.cli.commands import forwardpass
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"forwardpass: the command line needs {error.name}: pip install 'forwardpass[cli]'")
    forwardpass()
