"""Formats a failure: its reason, traceback and log line, without values of the payload, and without ever raising.

The text of a validation error shows the input. Wherever one occurs in a chain or group of exceptions, it is replaced by the
locations and types of the errors. The texts of other exceptions are the application's responsibility.
"""

import re
import sys
from collections.abc import Collection, Sequence
from traceback import format_exception
from typing import Any, Final, TypeGuard, cast

import msgspec

_MOST_ERRORS: Final = 10
"""Errors of one validation that are listed."""

_PATH: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?P<where>[$\w.\[\]]*)`)?$", re.DOTALL)
_HARMLESS: Final = re.compile(
    r"Expected `[^`]+`|Object missing required field `[^`]+`|Invalid (?:RFC3339 encoded \w+|ISO8601 duration|UUID|base64 encoded string)\Z"
)
_QUOTING: Final = {
    "Invalid enum value": "Invalid enum value",
    "Invalid value": "Invalid value",
    "Object contains unknown field": "Object contains an unknown field",
}


def reason_of(exc: BaseException) -> str:
    """Return the class and text of any exception; for a validation error, locations and error types."""
    try:
        return f"{type(exc).__name__}: {_safe_text(exc)}"
    except Exception as fault:  # noqa: BLE001 - an exception's own attributes may raise
        return f"{type(exc).__name__}: (its text cannot be shown: {type(fault).__name__})"


def text_of(value: object, exc: BaseException) -> str:
    """Return a reason as text: an exception by `reason_of`, anything else by ``str``.

    Args:
        value: The reason.
        exc: The exception that it was given for. Where the reason quotes a validation error of its chain, that is replaced.
    """
    return reason_of(value) if isinstance(value, BaseException) else _without_input(_text(value), _chain(exc))


def shown(exc: BaseException) -> tuple[BaseException, str]:
    """Return an exception that is safe to log, and its traceback with its whole chain.

    Usually the exception itself. If its chain has a validation error: a copy without the input. If it cannot be printed, because
    its own attributes raise: one that names its class only.
    """
    try:
        printable = exc
        if any(is_validation_error(member) for member in _chain(exc)):
            printable = _redacted(exc, {})
        return printable, "".join(format_exception(printable))
    except Exception as fault:  # noqa: BLE001 - an exception's own methods may raise; its message must be settled all the same
        printable = RuntimeError(f"{type(exc).__name__} (it cannot be shown: {type(fault).__name__})")
        return printable, f"{printable}\n"


def is_validation_error(exc: object) -> bool:
    """Whether the exception is one of msgspec or Pydantic whose text may show the input."""
    return isinstance(exc, msgspec.ValidationError) or _is_pydantic(exc)


def describe_validation(exc: BaseException, names: Collection[str] | None = None) -> str:
    """Return the locations and types of the errors in a payload, without its values.

    Args:
        exc: The validation error.
        names: The fields of the type: other parts of a location come from the payload, and are omitted. None: the fields of all models.
    """
    if not _is_pydantic(exc):
        return _describe_msgspec(exc)
    errors, names = exc.errors(), _fields_of_models() if names is None else names
    listed = [f"{_location(error['loc'], names)}: {error['type']}" for error in errors[:_MOST_ERRORS]]
    more = [f"and {len(errors) - len(listed)} more"] if len(errors) > len(listed) else []
    return "; ".join(listed + more)


def _describe_msgspec(exc: BaseException) -> str:
    found = _PATH.match(_text(exc))
    what, where = (found["what"], found["where"]) if found else ("", None)
    if exc.__cause__ is not None:  # raised by the type's own check, whose text is unknown
        what, where = f"its own check raised {type(exc.__cause__).__name__}", where if where != "$" else None
    elif not _HARMLESS.match(what):
        what = next((text for start, text in _QUOTING.items() if what.startswith(start)), "the value is not valid")
    return f"{what} - at `{where}`" if where else what


def _is_pydantic(exc: object) -> TypeGuard[Any]:
    if type(exc).__name__ != "ValidationError":
        return False
    return type(exc).__module__.split(".")[0] in ("pydantic", "pydantic_core") and hasattr(exc, "errors")


def _location(parts: tuple[object, ...], names: Collection[str]) -> str:
    return ".".join(str(part) if isinstance(part, int) or part in names else "*" for part in parts) or "payload"


def _fields_of_models() -> set[str]:
    """Return the names that a location may contain, of all models: an error does not say which model it is about."""
    names: set[str] = set()
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    ahead: list[Any] = [] if base is None else [base]
    while ahead:
        model = ahead.pop()
        ahead.extend(model.__subclasses__())
        names.add(model.__name__)
        for name, field in model.model_fields.items():
            names.update(alias for alias in (name, field.alias, field.validation_alias) if isinstance(alias, str))
    return names


def _safe_text(exc: BaseException) -> str:
    if is_validation_error(exc):
        return describe_validation(exc)
    return _without_input(_text(exc), _chain(exc))  # its text may quote the validation error that caused it


def _without_input(text: str, chain: Sequence[BaseException]) -> str:
    for member in chain:
        if is_validation_error(member):
            text = text.replace(_text(member), describe_validation(member))
    return text


def _text(value: object) -> str:
    try:
        return str(value)
    except BaseException as fault:  # noqa: BLE001 - an application's __str__ may raise anything
        return f"(its text cannot be shown: {type(fault).__name__})"


def _chain(exc: BaseException) -> list[BaseException]:
    """Return the exception with its causes, contexts and members, each once."""
    found: dict[int, BaseException] = {}
    ahead = [exc]
    while ahead:
        member = ahead.pop()
        if id(member) in found:
            continue
        found[id(member)] = member
        ahead.extend(next_ for next_ in (member.__cause__, member.__context__) if next_ is not None)
        ahead.extend(_members(member))
    return list(found.values())


def _members(exc: BaseException) -> Sequence[BaseException]:
    return cast("BaseExceptionGroup[BaseException]", exc).exceptions if isinstance(exc, BaseExceptionGroup) else ()


def _redacted(exc: BaseException, made: dict[int, BaseException]) -> BaseException:
    if id(exc) in made:
        return made[id(exc)]
    copy: BaseException
    members = _members(exc)
    if members:
        copy = BaseExceptionGroup(getattr(exc, "message", ""), [_redacted(member, made) for member in members])
    else:
        # A class of the same name, so that the log line looks the same.
        named = {"__module__": type(exc).__module__, "__qualname__": type(exc).__qualname__}
        copy = type(type(exc).__name__, (Exception,), named)(_safe_text(exc))
    made[id(exc)] = copy
    copy.__traceback__ = exc.__traceback__
    copy.__cause__ = exc.__cause__ and _redacted(exc.__cause__, made)
    copy.__context__ = exc.__context__ and _redacted(exc.__context__, made)
    copy.__suppress_context__ = exc.__suppress_context__
    for note in getattr(exc, "__notes__", ()):
        copy.add_note(_without_input(_text(note), _chain(exc)))
    return copy
