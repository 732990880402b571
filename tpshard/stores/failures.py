"""What went wrong in a store, in one line: the libraries' own errors put into words.

Libraries raise one kind of error for nearly everything; what tells is the store's own code (``NoSuchBucket``), or else
the status of the answer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from tpshard.errors import StorageError, TpshardError, printable

ACCESS = "which keys and tokens are read: docs/stores.md"


def _status(number: int) -> str:
    """An answer's status as the libraries write it, which is no part of a port or a time."""
    return rf"status code: {number}\b|, {number}$|\b{number} Client Error|'{number} "


# Codes of S3, of Azure, and words of the libraries, in the order in which they are looked for.
_SAID = (
    (r"RequestTimeTooSkewed|RequestExpired", "the store refuses this machine's clock", "set the clock, then run again"),
    (r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist",
     "there is no such bucket", "is the name right, and the endpoint?"),
    (r"RepositoryNotFound|Repository Not Found", "there is no such repository, or no access to it", ACCESS),
    (r"InvalidAccessKeyId|SignatureDoesNotMatch|AuthenticationFailed|InvalidToken|ExpiredToken|invalid_grant",
     "the store refuses the credentials", ACCESS),
    (r"169\.254\.169\.254|latest/(api/token|meta-data)|metadata\.google|default credentials were not found|"
     r"[Mm]issing.*[Cc]redential|IDENTITY_HEADER|Account must be specified|MissingAccount",
     "no credentials were found", ACCESS),
    (r"PermanentRedirect|incorrectly configured region|AuthorizationHeaderMalformed|IllegalLocationConstraint",
     "the bucket is in another region", "set AWS_REGION"),
    (r"PreconditionFailed|ConditionNotMet|PreconditionError|" + _status(412),
     "was changed while it was being read", "run again"),
    (r"InvalidRange|" + _status(416), "the store refuses the range that was asked for",
     "is the object shorter than it was?"),
    (r"SlowDown|ServerBusy|" + _status(429) + "|" + _status(503), "the store is too busy", "run again later"),
    (r"AccessDenied|AuthorizationFailure|AuthorizationPermissionMismatch|PermissionDeniedError|Forbidden|"
     + _status(403), "the store denies access", ACCESS),
    (r"Unauthenticated|Anonymous caller|" + _status(401), "the store wants credentials", ACCESS),
    (r"NoSuchKey|BlobNotFound|FileNotFoundError|No such object|" + _status(404), "is not there any more", "run again"),
    (r"error sending request|Connection refused|ConnectError|Cannot connect|ClientConnector|dns error|timed out|"
     r"Timeout", "the store cannot be reached", "is the endpoint right?"),
)  # fmt: skip


def failure(place: object, error: BaseException) -> StorageError:
    """A library's error as one of ours."""
    text = f"{type(error).__name__}: {error}".partition("\n\nDebug source:")[0]
    for pattern, what, hint in _SAID:
        if re.search(pattern, text):
            return StorageError(f"{place}: {what}", hint=hint)
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return StorageError(f"{place}: the store failed: {printable(first, 300)}", hint="run again")


@contextlib.contextmanager
def store_errors(place: object) -> Iterator[None]:
    """Whatever a library raises as StorageError."""
    try:
        yield
    except (TpshardError, TypeError, AttributeError, NameError, AssertionError):  # the last are our own faults
        raise
    except Exception as error:
        raise failure(place, error) from None
