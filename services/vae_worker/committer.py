"""What follows a decode: the picture's file, and the commit that makes it the request's result."""

from __future__ import annotations

from functools import partial

import torch

from services.vae_worker.decode_queue import Decode
from services.vae_worker.image_encoder import encode_image
from shared import metrics
from shared.messages import ImageDecoded, ReleaseLatents
from shared.store.records import Commit, Outcome, Records
from shared.watchdog import Patience, Watchdog
from shared.worker import run_beside


class Committer:
    """Encodes and commits pictures, beside the decodes of others.

    Args:
        records: Where results go.
        incarnation: This worker's.
        watchdog: Watches over every encoding.
        patience: How long one may take.
    """

    def __init__(
        self, records: Records, incarnation: str, watchdog: Watchdog, patience: Patience
    ) -> None:
        self._records = records
        self._incarnation = incarnation
        self._watchdog = watchdog
        self._patience = patience

    async def commit(self, decode: Decode, image: torch.Tensor) -> bool:
        """Store the picture; return False if its request is final or at another attempt.

        Raises:
            NumericalError: It is no picture.
        """
        command = decode.command
        parameters = command.parameters
        encode = partial(
            encode_image, image, parameters=parameters, skipped_steps=command.skipped_steps
        )
        encoded = await run_beside(
            self._watchdog,
            "the encoding of a picture",
            encode,
            within_s=self._patience.within_s(pixels=parameters.height * parameters.width),
        )
        metrics.IMAGES_ENCODED.labels(format=parameters.output_format).inc()
        handle = command.handle
        commit = Commit(
            decoded=ImageDecoded(
                incarnation=self._incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                decode_ms=decode.compute_s * 1000,
                transport=decode.transport,
            ),
            image=encoded,
            outcome=Outcome(
                content_type=f"image/{parameters.output_format}",
                size_bytes=len(encoded),
                seed=parameters.seed,
                skipped_steps=command.skipped_steps,
                warnings=command.warnings,
                decode_s=decode.compute_s,
                transport=decode.transport,
            ),
            release=ReleaseLatents(slot=handle.slot, generation=handle.generation),
            release_to=command.release_to,
        )
        return await self._records.commit(commit)
