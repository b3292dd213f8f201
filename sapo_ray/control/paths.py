"""`{job_id:segment}` in a route's path."""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor


class Segment(Convertor[str]):
    """Part of a path up to a slash or a colon, so that `/v1/jobs/{id}:cancel` is not a job of that name."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("segment", Segment())
