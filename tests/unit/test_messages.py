from __future__ import annotations

import ast
import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

from shared import messages

FOLDER = Path(messages.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
UNIONS = {
    "to_any_worker": "ToAnyWorker",
    "to_gateway": "ToGateway",
    "to_scheduler": "ToScheduler",
    "to_unet_worker": "ToUnetWorker",
    "to_vae_worker": "ToVaeWorker",
}
IN_EVERY_MESSAGE = {
    "request_id",
    "job_id",
    "attempt",
    "epoch",
    "incarnation",
    "step_index",
    "seq",
}
"""What the package's docstring explains once."""


def is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def unexplained(kind: ast.ClassDef) -> list[str]:
    """The fields that no text follows."""
    followers = zip(kind.body, [*kind.body[1:], None], strict=True)
    return [
        f"{kind.name}.{node.target.id}"
        for node, follower in followers
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if node.target.id not in IN_EVERY_MESSAGE and not is_text(follower)
    ]


def made_in(file: str) -> set[Any]:
    module = import_module(f"shared.messages.{file}")
    return {
        kind
        for kind in vars(module).values()
        if dataclasses.is_dataclass(kind) and getattr(kind, "__module__", "") == module.__name__
    } - {messages.NO_ROOM}


@pytest.mark.parametrize("file", FILES)
def test_every_field_is_explained_where_it_stands(file: str) -> None:
    tree = ast.parse((FOLDER / f"{file}.py").read_text())
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert kinds
    assert [name for kind in kinds for name in unexplained(kind)] == []


@pytest.mark.parametrize("file", UNIONS)
def test_every_message_of_a_file_can_be_sent_to_its_recipient(file: str) -> None:
    recipient = getattr(import_module(f"shared.messages.{file}"), UNIONS[file])
    assert made_in(file) <= set(get_args(recipient))


def test_every_message_is_one_that_the_codec_knows() -> None:
    sent = {kind for file in UNIONS for kind in made_in(file)}
    assert set(get_args(messages.Message)) == sent


def test_the_package_has_every_message_and_part() -> None:
    names = {kind.__name__ for file in FILES for kind in made_in(file)}
    assert names <= set(messages.__all__)
