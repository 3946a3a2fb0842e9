"""Lists with a cursor, the same for everything that has a time-ordered id."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Select, Table, select

Order = Literal["asc", "desc"]


def page_of(table: Table, *, owner: str | None, limit: int, order: Order, after: str | None) -> Select[Any]:
    """`limit` rows and one more, which says that the list goes on. `owner` None means everybody's.

    A cursor is no row that must exist: lists are also read to delete what they show.
    """
    column = table.c.id
    query = select(table).limit(limit + 1).order_by(column.desc() if order == "desc" else column)
    if owner is not None:
        query = query.where(table.c.owner == owner)
    if after is not None:
        query = query.where(column < after if order == "desc" else column > after)
    return query
