"""`synerdiff bench`: one command per benchmark; its module is loaded by its name, when it runs.

Each module has a function `run` that takes at least `seed: int` and `quick: bool`, and returns the
keys of its last line as a mapping; its parameters are the command's options.
"""

from __future__ import annotations

from typing import Final

import typer

from cli.lazy_command import add_lazy_command

BENCHMARKS: Final = {
    "emoji": "Does the embedded model draw what its captions say?",
    "parity": "Are the pictures those of diffusers, whatever shares their batch?",
    "loop": "What the services cost, against a bare loop in one process.",
    "chunking": "What a decode in chunks costs and saves.",
    "fidelity": "What skipped guidance does to the pictures.",
    "skip_search": "Which parameters the levels of skipped guidance should have.",
    "contention": "A step and a decode side by side, against one after the other.",
    "plan": "How fast and how good the scheduler's plans are.",
    "simulator": "How well the simulator foretells the real stack.",
    "policies": "SynerDiff against the other batching policies.",
    "liveness": "How soon pictures come again after hangs, poison, a full store, overload.",
    "transport": "Tensors through shared memory, against through Redis.",
}

bench = typer.Typer(
    help="Measure; every figure that is claimed comes from one of these.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@bench.callback()
def options() -> None:
    """Measure; every figure that is claimed comes from one of these."""


for _name, _summary in BENCHMARKS.items():
    add_lazy_command(
        bench,
        name=_name,
        target=f"bench.{_name}:run",
        summary=_summary,
        missing="the benchmarks need: pip install 'synerdiff[dev]'",
    )
