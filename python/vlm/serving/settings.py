"""What a server allows. Every limit has a safe default."""

from __future__ import annotations

from pydantic import Field

from vlm.config.options import Options
from vlm.runtime.pictures import PictureLimits


class ServerSettings(Options):
    """Limits of one server process."""

    name: str | None = Field(default=None, description="model name in requests and answers; default: the model's own")
    max_body_bytes: int = Field(default=32 * 2**20, gt=0, description="bytes of one request body")
    max_held_bytes: int = Field(default=256 * 2**20, gt=0, description="bytes of all request bodies held at a time; more are refused")
    header_seconds: float = Field(default=10.0, gt=0, description="time a connection has to send request line and headers")
    body_seconds: float = Field(default=30.0, gt=0, description="time a client has to send its body")
    max_picture_bytes: int = Field(default=20 * 2**20, gt=0, description="bytes of one encoded picture")
    max_pixels: int = Field(default=40_000_000, gt=0, description="width times height of one picture, read from its header")
    max_items: int = Field(default=256, gt=0, le=4096, description="pictures and texts of one request")
    max_characters: int = Field(default=20_000, gt=0, description="characters of one text")
    max_labels: int = Field(default=1000, gt=0, le=4096, description="labels of one classification")
    max_requests: int = Field(default=64, gt=0, description="requests worked on at a time; more are refused")
    queue_items: int = Field(default=2048, gt=0, description="pictures and texts that may wait; more are refused")
    max_batch: int = Field(default=32, gt=0, description="pictures or texts of one call of the model")
    max_pictures: int = Field(default=16, gt=0, description="pictures of one conversation")
    queue_answers: int = Field(default=64, gt=0, description="answers that may wait to be written; more are refused")
    max_answers: int = Field(default=8, gt=0, description="answers written side by side")
    max_new_tokens: int = Field(default=512, gt=0, description="longest answer where a request does not say, in tokens")
    batch_wait_seconds: float = Field(default=0.002, ge=0, description="time to wait for a batch to fill")
    write_seconds: float = Field(default=30.0, gt=0, description="time for which a client may take nothing of an answer")
    deadline_seconds: float = Field(default=60.0, gt=0, description="time a request may take before it is given up")
    decode_threads: int = Field(default=2, gt=0, description="pictures decoded at a time")
    drain_seconds: int = Field(default=30, gt=0, description="time for running requests after SIGTERM")

    @property
    def pictures(self) -> PictureLimits:
        return PictureLimits(max_bytes=self.max_picture_bytes, max_pixels=self.max_pixels)
