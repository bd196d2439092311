"""Links between the pages lead somewhere."""

from __future__ import annotations

import re

import pytest

from support.environments import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    outside_blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", outside_blocks, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        folder = (ROOT / page).parent
        links = re.findall(r"\]\((?!https?:)([^)\s#]+\.md)", (ROOT / page).read_text())
        waiting.extend(str((folder / link).resolve().relative_to(ROOT)) for link in links)
    assert reached >= set(PAGES)


ROOMS = {
    **{room: f"server/forwardpass_server/{room}" for room in ("app", "rpc", "models", "status", "sessions", "catalog")},
    **{room: f"server/forwardpass_server/{room}" for room in ("calls", "weights", "access", "process", "telemetry")},
    "wire": "protos/forwardpass/wire",
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_module_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    named = [(ROOMS[room], module) for room, module in re.findall(rf"`({'|'.join(ROOMS)})\.([a-z_.]+)`", text)]
    named += [("client/forwardpass_client", module) for module in re.findall(r"\(client `(\w+)`\)", text)]
    # weights.proto is a file of the protocol.
    paths = [f"{folder}/{module.replace('.', '/')}" for folder, module in named if module != "proto"]
    missing = [path for path in paths if not (ROOT / f"{path}.py").exists() and not (ROOT / path).is_dir()]
    assert missing == []
    assert named or page != "docs/internals.md"
