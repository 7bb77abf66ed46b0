"""Who may do what: the admin token opens all, the predict token all that changes no state."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from service.api.problems import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, description="TARE_ADMIN_TOKEN or TARE_PREDICT_TOKEN")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Tokens:
    """The service's tokens; None is a door without a lock."""

    admin: str | None
    predict: str | None

    def let_predict(self, authorization: str | None) -> bool:
        """Whether a request with this Authorization header may do what changes no state."""
        if self.predict is None:
            return True
        scheme, token = get_authorization_scheme_param(authorization)
        return scheme.lower() == "bearer" and _opens(token, self.predict, self.admin)


async def may_predict(request: Request, credentials: Credentials) -> None:
    """Let in whoever needs no token or has one of the two. Raises Unauthorized."""
    tokens: Tokens = request.app.state.tokens
    if not tokens.let_predict(request.headers.get("authorization")):
        raise _unauthorized(credentials)


async def may_change(request: Request, credentials: Credentials) -> None:
    """Let in whoever has the admin token, where there is one. Raises Unauthorized or Forbidden."""
    tokens: Tokens = request.app.state.tokens
    given = None if credentials is None else credentials.credentials
    if tokens.admin is None or _opens(given, tokens.admin):
        return
    if _opens(given, tokens.predict):
        raise Forbidden("token-without-right", "This token may not change state; use the admin token.")
    raise _unauthorized(credentials)


AdminDep = Depends(may_change)


def _opens(given: str | None, *tokens: str | None) -> bool:
    """Compare in constant time, whatever the lengths, and with every token."""
    if not given:
        return False
    digest = _digest(given)
    matches = [token is not None and hmac.compare_digest(digest, _digest(token)) for token in tokens]
    return any(matches)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(credentials: HTTPAuthorizationCredentials | None) -> Unauthorized:
    if credentials is None:
        return Unauthorized("token-missing", "Send a token as Authorization: Bearer.")
    return Unauthorized("token-unknown", "This token is not known here.")
