"""Every command that a page tells somebody to type is there, with the options that are named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sapo_ray.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "adr" not in path.parts),
    ROOT / "README.md",
    *(ROOT / "helm" / "sapo-ray" / name for name in ("README.md", "templates/NOTES.txt")),
    *(ROOT / "deploy" / name for name in ("compose.yaml", "compose.env.example")),
]


def typed(text: str) -> Iterator[str]:
    """What follows `sapo-ray` in inline code and in code blocks."""
    lines = re.findall(r"`([^`\n]+)`", text) + re.findall(r"(?m)^(?:#? {3,4}|\$ )(.+)$", text)
    for block in re.findall(r"(?s)```\w*\n(.*?)```", text):
        lines += block.splitlines()
    for line in lines:
        for found in re.finditer(r"(?:^|[ (=])(?<!install )(?<!-n )sapo-ray ([a-z][^#|;&]*)", line):
            yield found[1]


def wrong(words: str) -> str | None:
    command: Any = typer.main.get_command(app)
    rest = words.split()
    while hasattr(command, "commands"):
        inner = command.commands.get(rest[0]) if rest else None
        if inner is None:
            return f"there is no `sapo-ray {words}`"
        command, rest = inner, rest[1:]
    known = {"--help"}.union(*([*one.opts, *one.secondary_opts] for one in command.params))
    unknown = {word.split("=")[0].rstrip(".,)") for word in rest if word.startswith("--")} - known
    return f"`sapo-ray {words}` has no {', '.join(sorted(unknown))}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_no_command_that_there_is_not(page: Path) -> None:
    found = [said for words in typed(page.read_text()) if (said := wrong(words))]
    assert not found, "\n".join(found)


def test_commands_are_found_in_pages() -> None:
    assert len(list(typed((ROOT / "docs" / "operations.md").read_text()))) >= 25
    assert list(typed("`sapo-ray fly --now`, and\n\n    sapo-ray get JOB  # one\n")) == ["fly --now", "get JOB  "]
    assert wrong("fly --now") == "there is no `sapo-ray fly --now`"
    assert wrong("get JOB --now") == "`sapo-ray get JOB --now` has no --now"
