"""A decoding process: jobs in on stdin, results out on stdout, both as length-prefixed frames.

Started by `vlm.data.pool` as a program of its own, so it shares neither memory, locks nor open files with the
trainer. It ends when its input ends, and leaves interrupts to the trainer.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import IO

FRAME = struct.Struct("<II")
"""Lengths of a frame's two parts."""


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """`count` bytes, or fewer at the end of the stream."""
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_frame(stream: IO[bytes]) -> tuple[bytes, bytes] | None:
    """The two parts of the next frame, or None at the end of the stream or when it breaks off."""
    head = read_exactly(stream, FRAME.size)
    if len(head) < FRAME.size:
        return None
    first, second = FRAME.unpack(head)
    body = read_exactly(stream, first + second)
    return (body[:first], body[first:]) if len(body) == first + second else None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    # Results keep the real stdout for themselves; whatever a library prints goes to stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from vlm.data.decode import Job, decoder_of, pack

    first = read_frame(source)
    if first is None:
        return
    decoder = decoder_of(json.loads(first[0]))
    while (frame := read_frame(source)) is not None:
        jobs = [Job(*values) for values in json.loads(frame[0])]
        head, pixels = pack([decoder.decode(job) for job in jobs])
        try:
            sink.write(FRAME.pack(len(head), len(pixels)))
            sink.write(head)
            sink.write(pixels)
            sink.flush()
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
