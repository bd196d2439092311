"""The versions that the image installs."""

from __future__ import annotations

import re

from support.environments import ROOT


def pins(name: str) -> dict[str, str]:
    """Version by distribution, in deploy/image/NAME.txt. Every one has a hash."""
    text = (ROOT / "deploy" / "image" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=", text, re.MULTILINE))
