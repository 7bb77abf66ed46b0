"""Who may do what: the admin token opens all, the predict token all that changes no state."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.problems import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, description="TARE_ADMIN_TOKEN or TARE_PREDICT_TOKEN")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Tokens:
    """The service's tokens; None is a door without a lock."""

    admin: str | None
    predict: str | None


async def may_predict(request: Request, credentials: Credentials) -> None:
    """Let in whoever needs no token or has one of the two. Raises Unauthorized."""
    tokens: Tokens = request.app.state.tokens
    if tokens.predict is not None and not _opens(credentials, tokens.predict, tokens.admin):
        raise _unauthorized(credentials)


async def may_change(request: Request, credentials: Credentials) -> None:
    """Let in whoever has the admin token, where there is one. Raises Unauthorized or Forbidden."""
    tokens: Tokens = request.app.state.tokens
    if tokens.admin is None or _opens(credentials, tokens.admin):
        return
    if _opens(credentials, tokens.predict):
        raise Forbidden("token-without-right", "This token may not change state; use the admin token.")
    raise _unauthorized(credentials)


AdminDep = Depends(may_change)


def _opens(credentials: HTTPAuthorizationCredentials | None, *tokens: str | None) -> bool:
    """Compare in constant time, whatever the lengths, and with every token."""
    if credentials is None:
        return False
    given = _digest(credentials.credentials)
    matches = [token is not None and hmac.compare_digest(given, _digest(token)) for token in tokens]
    return any(matches)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(credentials: HTTPAuthorizationCredentials | None) -> Unauthorized:
    if credentials is None:
        return Unauthorized("token-missing", "Send a token as Authorization: Bearer.")
    return Unauthorized("token-unknown", "This token is not known here.")
