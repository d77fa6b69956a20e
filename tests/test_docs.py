"""The pages say what is so: messages that are quoted, files and fields that are named."""

import ast
import re
from pathlib import Path

import pytest

from tvq import config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
FROM_ELSEWHERE = {"RESOURCE_EXHAUSTED"}  # quoted, and said by XLA


def texts() -> list[str]:
    """Every string in the sources: what stands between the values of an f-string counts as one each."""
    nodes = [node for path in (ROOT / "tvq").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def messages() -> list[str]:
    """What opens an entry."""
    opened = re.findall(r"^- `([^`]+)`", TROUBLE, re.MULTILINE)
    return [message for message in opened if message not in FROM_ELSEWHERE]


def test_every_quoted_message_is_said():
    known = texts()
    assert len(messages()) > 15
    for message in messages():
        for part in re.split("…", message):
            assert any(part.strip() in text for text in known), f"{message!r}: nothing says {part!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    fields, sections = config.docs(), {name.split(".")[0] for name in config.docs()}
    for quoted in re.findall(r"`([^`\n]+)`", text):
        name = quoted.removeprefix("config.").partition("=")[0]
        if re.fullmatch(r"[a-z]+\.[a-z_]+", name) and name.split(".")[0] in sections:
            is_file = any(ROOT.glob(f"**/{name}")) if name.endswith((".py", ".json", ".md")) else False
            assert name in fields or is_file, f"{page.name}: {quoted} is no field"
        if re.fullmatch(r"(tvq|tests|configs|launch|docker|docs)/[\w./]*", quoted):
            assert (ROOT / quoted).exists(), f"{page.name}: there is no {quoted}"
