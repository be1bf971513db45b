"""A hospital's own training requests. What it asked for is remembered, so that it can consent to exactly that by itself."""

from typing import Any

from pydantic import ValidationError

from fl_client.site import Site
from medhive.errors import InvalidInput
from medhive.spec import RunSpec, explain
from medhive.wire import NewRequest, Reason, RequestAnswer


def send_request(
    site: Site,
    study: str,
    options: dict[str, Any],
    *,
    person: str,
    note: str = "",
    base_version: int | None = None,
) -> RequestAnswer:
    """Ask the coordinator for a run; `person` will stand in this hospital's consent to it.

    Args:
        options: fields of `medhive.spec.RunOptions`; the study's defaults fill the rest.

    Raises:
        InvalidInput: a value does not fit, or the coordinator made something else of the request.
        MedHiveError: the coordinator's refusal.
    """
    if not person.strip():
        raise InvalidInput("A request needs the name of the person who makes it.")
    try:
        request = NewRequest(study=study, options=options, base_version=base_version, note=note)
    except ValidationError as error:
        raise InvalidInput(f"The request does not fit: {explain(error)}.") from error
    answer = site.gateway.send_request(request)
    _require_faithful(answer.spec, request)
    site.store.keep_request(answer.id, study, answer.spec.spec_hash, person.strip())
    return answer


def cancel_request(site: Site, request_id: str, reason: str = "") -> RequestAnswer:
    """Take a pending request back.

    Raises:
        MedHiveError: it is not this hospital's, or no longer pending.
    """
    answer = site.gateway.post(f"/requests/{request_id}/cancel", Reason(reason=reason))
    return RequestAnswer.model_validate(answer)


def _require_faithful(spec: RunSpec, request: NewRequest) -> None:
    """What was asked for must stand in the specification; only then does the own consent follow by itself."""
    made = spec.options.model_dump(mode="json")
    for name, value in request.options.items():
        wanted = value.lower() if name == "strategy" and isinstance(value, str) else value
        if name in made and made[name] != wanted and not isinstance(wanted, dict):
            raise InvalidInput(
                f"The coordinator understood {name} as {made[name]!r} instead of {value!r}; cancel the request.",
                option=name,
            )
