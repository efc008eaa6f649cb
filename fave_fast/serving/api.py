"""What goes over the wire: requests, answers and errors as Pydantic models, with the server's limits in the schema."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    WithJsonSchema,
    create_model,
)

from fave_fast.errors import InputError
from fave_fast.ops.score_topk import MAX_K

MAX_ID_CHARACTERS = 256


def _whole(value: object) -> object:
    """JSON has one kind of number: 12.0 is 12."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[StrictInt, BeforeValidator(_whole)]
# A float comes last, so that no other id pays for a call into Python.
Id = Annotated[
    StrictInt | Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_ID_CHARACTERS)] | Whole,
    WithJsonSchema(
        {"anyOf": [{"type": "integer"}, {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARACTERS}]}
    ),
]
ID_MEANING = f"a whole number or a text of 1 to {MAX_ID_CHARACTERS} characters"
ID_DEPTHS = {"histories": 4, "deny": 3}  # parts of an id's place in an error; what follows says which kind it is not


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    `k + deny` stays within what the kernels take in one list, for denied items are exactly those that are dropped from
    a list so much longer.
    """

    k: int = 200
    deny: int = 800
    histories: int = 256
    history: int = 2000
    body_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "deny" else 1
            if getattr(self, field.name) < least:
                raise InputError(f"the limit of {field.name} is {getattr(self, field.name)}; expected at least {least}")
        if self.k + self.deny > MAX_K:
            raise InputError(
                f"the limits of k and deny are {self.k} and {self.deny}; expected no more than {MAX_K} together"
            )


class RecommendRequest(BaseModel):
    """Histories to be answered with the K best next items each."""

    model_config = ConfigDict(extra="forbid")

    histories: list[list[Id]] = Field(
        description="One list of item ids for each user, oldest first. Ids that the catalogue does not hold are "
        "skipped; a history without any known item is answered with the most popular items."
    )
    k: Whole = Field(description="Length of the lists.")
    exclude_history: StrictBool = Field(True, description="Never recommend an item of the user's own history.")
    deny: list[Id] = Field(default=[], description="Items that are not to be recommended; unknown ones change nothing.")


def request_model(limits: Limits, k: int) -> type[RecommendRequest]:
    """`RecommendRequest` with `limits` in its fields, and `k` for who names none.

    Lists are read up to their first fault: a body may hold as many as it has bytes.
    """
    history = Annotated[list[Id], FailFast(), Field(max_length=limits.history)]
    histories = Annotated[list[history], FailFast()]
    of_base = RecommendRequest.model_fields

    def field(name: str, default: Any, **bounds: Any) -> Any:
        return Field(default, description=of_base[name].description, **bounds)

    return create_model(
        "RecommendRequest",
        __base__=RecommendRequest,
        __doc__=RecommendRequest.__doc__,
        histories=(histories, field("histories", ..., min_length=1, max_length=limits.histories)),
        k=(Whole, field("k", k, ge=1, le=limits.k)),
        deny=(Annotated[list[Id], FailFast()], field("deny", [], max_length=limits.deny)),
    )


class RankedList(BaseModel):
    """The list of one history, best first; shorter than k where fewer items are left to recommend."""

    items: list[int | str]
    scores: list[float] = Field(description="Inner products; where `popular`, how often an item was trained on.")
    unknown: int = Field(description="Ids of the history that the catalogue does not hold.")
    popular: bool = Field(description="No id of the history is known: the most popular items instead.")
    version: int = Field(description="Of the catalogue; a list never mixes two.")


class RecommendResponse(BaseModel):
    """One list a history, in the order of the request, all by one model."""

    model: str = Field(description="SHA-256 of the checkpoint's content.")
    lists: list[RankedList]


class Status(BaseModel):
    """What a probe hears."""

    status: str


class Reloaded(BaseModel):
    """The model that is served now."""

    model: str = Field(description="SHA-256 of the checkpoint's content.")
    items: int = Field(description="Items of its catalogue.")


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class FieldProblem(BaseModel):
    """One thing wrong with a request."""

    loc: list[int | str] = Field(description="Where: `body`, the field, then the place in it.")
    msg: str = Field(description="What was expected.")
    type: str


class FieldProblems(BaseModel):
    """All that is wrong with a request."""

    detail: list[FieldProblem]
