"""What PyTorch may change without notice is used in one place."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCES = Path(__file__).parents[2]
ALLOWED = Path("services/unet_worker/backends/cpu")
PRIVATE = ("torch.jit", "torch.ops", "torch._C")


def _private_names(source: str) -> set[str]:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return {ast.unparse(node) for node in nodes} & set(PRIVATE)


def test_scripts_and_private_operators_are_the_cpu_backends_alone() -> None:
    found = {
        path.relative_to(SOURCES)
        for folder in ("services", "shared")
        for path in (SOURCES / folder).rglob("*.py")
        if _private_names(path.read_text())
    }
    assert found
    assert {path for path in found if ALLOWED not in path.parents} == set()
