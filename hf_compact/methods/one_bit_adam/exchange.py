"""The mean of one buffer per rank at a few bits per value: two phases, with error feedback at workers and servers.

Every rank encodes its buffer chunk by chunk and sends chunk j to rank j (all-to-all). Rank j averages what it received,
encodes the average and sends it to all (all-gather). What a code misses is added to what is encoded next. All ranks
decode the same bytes, so they hold the same mean, bit for bit.

Source: 1-bit Adam (arXiv 2102.02888), widths by L-GreCo (arXiv 2210.17357); differs by one message per phase for the
whole model, scales included.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...budget import Choice, allocate_within
from ...distributed import broadcast_, rank, world_size
from ...errors import NumericalError
from ...report import CommReport
from .config import BITS
from .functional import Segment, add_decoded_, encode_, message_bytes, quantize_, split_into_chunks

HOW_TO_STAY_FINITE = "lower the learning rate, or train in bfloat16 or float32"


class CompressedMean:
    """Errors and layout of the exchange.

    `buffer` is the worker's error between exchanges. A caller adds its values to it and calls `mean_into`.
    """

    def __init__(self, sizes: Sequence[int], bits: Sequence[int], mask: Tensor | None, report: CommReport, device: torch.device):
        """Start without errors.

        Args:
            sizes: values of each tensor.
            bits: width of each tensor's codes.
            mask: `[sum(sizes)]` bool, false where the mean is 0 by definition and no error may gather; None without such.
            report: counts the bytes.
            device: where buffers live.
        """
        self.sizes, self.mask, self.report = list(sizes), mask, report
        self.buffer = torch.zeros(sum(sizes), device=device)
        self.server_error = torch.zeros(0, device=device)
        self.chunks: list[list[Segment]] = []
        self.set_bits(bits)

    def set_bits(self, bits: Sequence[int]) -> None:
        """Take other widths from the next exchange on.

        Other widths move the chunks, so the server's error becomes part of the own worker's: it was an error of the mean
        of `world_size` buffers, so it counts that many times in one of them.
        """
        if self.chunks:
            self._own(self.buffer).add_(self.server_error, alpha=world_size())
        self.bits = list(bits)
        self.chunks = split_into_chunks(self.sizes, self.bits, world_size())
        self.live = [[self._count_live(segment) for segment in chunk] for chunk in self.chunks]
        self.num_bytes = max(message_bytes(chunk) for chunk in self.chunks)
        self.server_error = torch.zeros_like(self._own(self.buffer))

    @torch.no_grad()
    def mean_into(self, target: Tensor) -> None:
        """Overwrite `target` by the mean of all ranks' `buffer`, and keep the errors.

        Raises:
            NumericalError: a rank's values are not finite; raised on all ranks at once.
        """
        size, device = world_size(), target.device
        self._apply_mask(self.buffer)
        sent = torch.empty(size, self.num_bytes, dtype=torch.uint8, device=device)
        for chunk, live, message in zip(self.chunks, self.live, sent, strict=True):
            encode_(_part(self.buffer, chunk), chunk, live, message)
        self._apply_mask(self.buffer)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        self.report.add("momentum, to its server", (size - 1) * self.num_bytes)

        mine = self.chunks[rank()]
        for message in received:
            add_decoded_(self.server_error, mine, message, 1 / size)
        answer = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        encode_(self.server_error, mine, self.live[rank()], answer)
        if self.mask is not None:
            self.server_error.mul_(self._own(self.mask))
        dist.all_gather_single(received.view(-1), answer)
        self.report.add("mean momentum, to all", (size - 1) * self.num_bytes)

        target.zero_()
        scales = []
        for chunk, message in zip(self.chunks, received, strict=True):
            add_decoded_(_part(target, chunk), chunk, message)
            scales.append(message[: 4 * len(chunk)].view(torch.float32))
        self._apply_mask(target)
        if not torch.cat(scales).isfinite().all():
            raise NumericalError(f"a gradient is not finite on some rank: {HOW_TO_STAY_FINITE}")

    def choose_bits(self, of_bits: int) -> list[int]:
        """Widths with the fewest bytes whose squared error on rank 0's buffer is at most that of `of_bits` for all tensors."""
        errors = torch.zeros(len(self.sizes), len(BITS), dtype=torch.float64, device=self.buffer.device)
        if rank() == 0:
            for row, values in zip(errors, self.buffer.split(self.sizes), strict=True):
                for column, bits in enumerate(BITS):
                    missed = values.clone()
                    quantize_(missed, bits, torch.linalg.vector_norm(values) / len(values) ** 0.5)
                    row[column] = missed.square_().sum()
        broadcast_([errors], 0)
        self.report.add("control", errors.numel() * 8 if rank() == 0 else 0)
        choices = [
            [Choice(message_bytes([Segment(0, 0, size, bits)]), error) for bits, error in zip(BITS, row, strict=True)]
            for size, row in zip(self.sizes, errors.tolist(), strict=True)
        ]
        return [BITS[index] for index in allocate_within(choices, sum(row[BITS.index(of_bits)].error for row in choices))]

    def _own(self, flat: Tensor) -> Tensor:
        return _part(flat, self.chunks[rank()])

    def _count_live(self, segment: Segment) -> int:
        return segment.num_values if self.mask is None else int(self.mask[segment.start : segment.stop].sum())

    def _apply_mask(self, flat: Tensor) -> None:
        if self.mask is not None:
            flat.mul_(self.mask)


def _part(flat: Tensor, chunk: Sequence[Segment]) -> Tensor:
    return flat[chunk[0].start : chunk[-1].stop] if chunk else flat[:0]
