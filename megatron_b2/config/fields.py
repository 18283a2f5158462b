"""What the schema says about itself: every setting with its type, default and documentation."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_b2.config.keys import Key


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema."""

    key: Key
    annotation: Any
    default: Any
    """MISSING when the setting is required."""
    doc: str

    @property
    def required(self) -> bool:
        """Whether every run has to give it."""
        return self.default is MISSING


@cache
def type_hints(schema: type) -> Mapping[str, Any]:
    """The resolved annotations of a schema class."""
    return MappingProxyType(get_type_hints(schema))


@cache
def field_docs(schema: type) -> Mapping[str, str]:
    """The documentation string under each field of a schema class and of those it inherits from.

    A field without one shares that of the next field that has one.
    """
    docs: dict[str, str] = {}
    for base in schema.__bases__:
        if is_dataclass(base):
            docs |= field_docs(base)
    tree = ast.parse(inspect.getsource(sys.modules[schema.__module__]))
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    waiting: list[str] = []
    for node in classes[schema.__name__]:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                waiting.append(name)
            case ast.Expr(value=ast.Constant(value=str(text))):
                docs |= dict.fromkeys(waiting, " ".join(text.split()))
                waiting = []
    return MappingProxyType(docs)


def settings(schema: type, key: Key = ()) -> Iterator[Setting]:
    """Every leaf of the schema in order; a list of tables and a free table count as leaves."""
    for field in fields(schema):
        annotation = type_hints(schema)[field.name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            yield from settings(annotation, (*key, field.name))
        else:
            yield Setting((*key, field.name), annotation, default_of(field), field_docs(schema)[field.name])


def default_of(field: Field[Any]) -> Any:
    """The default of a dataclass field, or MISSING."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def optional_inner(annotation: Any) -> Any | None:
    """X for X | None; None for every other annotation."""
    if get_origin(annotation) not in (Union, UnionType):
        return None
    (inner,) = (item for item in get_args(annotation) if item is not NoneType)
    return inner


def type_name(annotation: Any) -> str:
    """The type as help and errors call it."""
    inner, origin, arguments = optional_inner(annotation), get_origin(annotation), get_args(annotation)
    if inner is not None:
        return f"{type_name(inner)} or none"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return "a list of tables" if is_dataclass(arguments[0]) else f"a list, each {type_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {type_name(arguments[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return names.get(annotation, "a table")
