"""Records of requests and workers are written in one module of the scheduler."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import services.scheduler
from services.scheduler.core.state import Request, SlotInFlight, UnetWorker, Usage, VaeWorker

FOLDER = Path(services.scheduler.__file__).parent
OWNER = FOLDER / "core" / "cluster.py"
RECORDS = (Request, SlotInFlight, UnetWorker, Usage, VaeWorker)
FIELDS = frozenset(field.name for record in RECORDS for field in fields(record))
CONTAINERS = frozenset({"requests", "unets", "vaes", "slots", "usage", "decodes", "chunk_counts"})
CHANGES = frozenset({"append", "clear", "pop", "popleft", "remove", "setdefault", "update"})


def written_fields(source: str) -> Iterator[str]:
    """Fields of other objects' that are assigned to, deleted from or changed in place."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Store(), value=owner) if name in FIELDS:
                if not (isinstance(owner, ast.Name) and owner.id == "self"):
                    yield f"{name} in line {node.lineno}"
            case ast.Subscript(value=ast.Attribute(attr=name), ctx=ast.Store() | ast.Del()):
                if name in CONTAINERS:
                    yield f"{name}[...] in line {node.lineno}"
            case ast.Call(func=ast.Attribute(attr=call, value=ast.Attribute(attr=name))):
                if call in CHANGES and name in CONTAINERS:
                    yield f"{name}.{call} in line {node.lineno}"


@pytest.mark.parametrize("folder", ["core", "planning", "devices", "shell"])
def test_only_the_cluster_writes_them(folder: str) -> None:
    others = [path for path in (FOLDER / folder).glob("*.py") if path != OWNER]
    assert others
    found = {path.name: list(written_fields(path.read_text())) for path in others}
    assert not {name: writes for name, writes in found.items() if writes}


def test_the_cluster_does() -> None:
    assert len(list(written_fields(OWNER.read_text()))) > 20
