"""Documentation of settings, taken from the field docstrings: for ``--help`` and for the docs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from typing import TYPE_CHECKING, Any, get_type_hints

from specpool.config.loading import flag_name, variable_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FieldDoc:
    """One setting."""

    name: str
    type: Any
    """Resolved annotation."""
    default: object
    """`dataclasses.MISSING` if the setting is required."""
    doc: str
    """The string literal under the field."""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """The type as written in code."""
        return self.type.__name__ if isinstance(self.type, type) else str(self.type).replace("typing.", "")

    @property
    def flag(self) -> str:
        """``--max-lookahead``."""
        return flag_name(self.name)

    def variable(self, section: str) -> str:
        """``SPECPOOL_TARGET_MAX_LOOKAHEAD``."""
        return variable_name(section, self.name)


def describe(cls: type[DataclassInstance]) -> tuple[FieldDoc, ...]:
    """Every setting of the dataclass ``cls``, in order."""
    types = get_type_hints(cls)
    docs = field_docstrings(cls)
    return tuple(
        FieldDoc(name=field.name, type=types[field.name], default=_default(field), doc=docs.get(field.name, ""))
        for field in dataclasses.fields(cls)
        if field.init
    )


def field_docstrings(cls: type) -> dict[str, str]:
    """The string literals under the annotated fields of ``cls`` and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _docstrings_of_body(_class_body(base))
    return docs


def _class_body(cls: type) -> list[ast.stmt]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    definition = tree.body[0]
    return definition.body if isinstance(definition, ast.ClassDef) else []


def _docstrings_of_body(body: list[ast.stmt]) -> dict[str, str]:
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                docs[statement.target.id] = " ".join(inspect.cleandoc(text).split())
    return docs


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
