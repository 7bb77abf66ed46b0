"""Hands the service's parts to a route."""

from typing import Annotated

from fastapi import Depends, Request

from service.core.parts import Parts


def parts_of(request: Request) -> Parts:
    """Return the parts that the application's lifespan built."""
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(parts_of)]
