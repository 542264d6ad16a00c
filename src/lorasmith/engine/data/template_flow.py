"""Where the content of a message can go in a chat template: into the text and nowhere else, or also into a decision.

A template that only writes contents between its own words, trimmed or not, makes the same words of any two contents. That is
decided on its syntax tree, by following what each expression may hold, so for every conversation at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache

from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorasmith.engine.data.template_limits import Generation

TRIMMING = {"strip", "lstrip", "rstrip"}
FUNCTIONS = {"namespace", "range", "raise_exception"}
TYPE_TESTS = {"defined", "undefined", "none", "string", "mapping", "number", "boolean", "sequence", "iterable"}
MOST_PASSES = 8  # over a template; real ones take two or three, and a chain of names could take one for each
LOOP_COUNTS = {"index", "index0", "revindex", "revindex0", "first", "last", "length"}


class Holds(Enum):
    """What an expression may be: free of contents, a content (maybe with words around it), a message, a list of messages."""

    CLEAN = auto()
    TEXT = auto()
    MESSAGE = auto()
    LIST = auto()


CLEAN, TEXT, MESSAGE, LIST = Holds
OF_A_LIST = {"length": CLEAN, "count": CLEAN, "first": MESSAGE, "last": MESSAGE, "list": LIST}


class LooksInside(Exception):
    """The template does something with a content that depends on what is in it, or that is not followed here."""


@dataclass(frozen=True)
class Flow:
    """`trims`: white space around a content may be taken away."""

    trims: bool


@lru_cache(maxsize=8)
def content_flow(template: str) -> Flow | None:
    """How contents flow into the text, where they go nowhere else; else None."""
    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    reader = Reader()
    try:
        tree = environment.parse(template)
        for _ in range(MOST_PASSES):  # a name may be read above where it is assigned, in the next turn of a loop
            before = dict(reader.names)
            reader.statements(tree.body)
            if before == reader.names:
                return Flow(reader.trims)
    except (LooksInside, RecursionError):
        pass
    return None


@dataclass
class Reader:
    """Follows statements in any order: what a name holds is what any of its assignments gives it."""

    names: dict[str, Holds] = field(default_factory=lambda: {"messages": LIST})
    namespaces: set[str] = field(default_factory=set)  # what has parts; by another name it would be the same one
    trims: bool = False

    def statements(self, body: list[nodes.Node]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: nodes.Node) -> None:
        match node:
            case nodes.Output():
                for part in node.nodes:
                    self.written(part)
            case nodes.If():
                self.decided(node.test)
                self.statements([*node.body, *node.elif_, *node.else_])
            case nodes.For(recursive=False):
                holds = self.value(node.iter)
                if holds not in (CLEAN, LIST):
                    raise LooksInside
                self.assign(node.target, MESSAGE if holds is LIST else CLEAN)
                if node.test is not None:
                    self.decided(node.test)
                self.statements([*node.body, *node.else_])
            case nodes.Assign():
                self.assign(node.target, self.value(node.node))
            case nodes.Break() | nodes.Continue():
                pass
            case _:
                raise LooksInside

    def assign(self, target: nodes.Node, holds: Holds) -> None:
        match target:
            case nodes.Name(name=name):
                self.bind(name, holds)
            case nodes.NSRef(name=name, attr=attribute):
                self.namespaces.add(name)
                self.bind(f"{name}.{attribute}", holds)
            case nodes.Tuple(items=items) if holds is CLEAN:
                for item in items:
                    self.assign(item, CLEAN)
            case _:
                raise LooksInside

    def bind(self, name: str, holds: Holds) -> None:
        self.names[name] = either(self.names.get(name, holds), holds)

    def written(self, node: nodes.Node) -> Holds:
        """Of something that ends in the text."""
        holds = CLEAN if isinstance(node, nodes.TemplateData) else self.value(node)
        if holds not in (CLEAN, TEXT):
            raise LooksInside
        return holds

    def decided(self, node: nodes.Node) -> None:
        """Of something that is only asked whether it is there: a content that is not empty always is."""
        match node:
            case nodes.And(left=left, right=right) | nodes.Or(left=left, right=right):
                self.decided(left)
                self.decided(right)
            case nodes.Not(node=inner):
                self.decided(inner)
            case _:
                self.value(node)

    def clean(self, *parts: nodes.Node | None) -> Holds:
        if any(part is not None and self.value(part) is not CLEAN for part in parts):
            raise LooksInside
        return CLEAN

    def value(self, node: nodes.Node) -> Holds:
        match node:
            case nodes.Const() | nodes.TemplateData():
                return CLEAN
            case nodes.Name(name=name) if name != "loop" and name not in self.namespaces:
                return self.names.get(name, CLEAN)
            case nodes.Getattr(node=owner, attr=key):
                return self.member(owner, key)
            case nodes.Getitem(node=owner, arg=nodes.Const(value=str() as key)):
                return self.member(owner, key)
            case nodes.Getitem(node=owner, arg=place):
                return self.element(owner, place)
            case nodes.Add(left=left, right=right):
                return either(self.written(left), self.written(right))
            case nodes.Concat(nodes=parts):
                return TEXT if TEXT in [self.written(part) for part in parts] else CLEAN
            case nodes.And(left=left, right=right) | nodes.Or(left=left, right=right):
                return either(self.value(left), self.value(right))
            case nodes.Not():
                self.decided(node)
                return CLEAN
            case nodes.CondExpr(test=test, expr1=one, expr2=other):
                self.decided(test)
                return either(self.value(one), self.value(other)) if other is not None else self.value(one)
            case nodes.Compare():
                return self.comparison(node)
            case nodes.Test(node=inner, name=name) if name in TYPE_TESTS:
                self.value(inner)
                return CLEAN
            case nodes.Test(node=inner):
                return self.clean(inner, *node.args)
            case nodes.Filter(node=inner) if inner is not None:
                return self.filtered(node, inner)
            case nodes.Call():
                return self.call(node)
            case nodes.BinExpr(left=left, right=right):
                return self.clean(left, right)
            case nodes.UnaryExpr(node=inner):
                return self.clean(inner)
            case nodes.List(items=items) | nodes.Tuple(items=items):
                return self.clean(*items)
            case nodes.Dict(items=items):
                return self.clean(*(part for pair in items for part in (pair.key, pair.value)))
        raise LooksInside

    def member(self, owner: nodes.Node, key: str) -> Holds:
        if isinstance(owner, nodes.Name) and owner.name == "loop" and key in LOOP_COUNTS:
            return CLEAN  # the others are items of what it goes over
        if isinstance(owner, nodes.Name) and owner.name in self.namespaces:
            return self.names.get(f"{owner.name}.{key}", CLEAN)
        holds = self.value(owner)
        if holds is CLEAN:
            return CLEAN
        if holds is MESSAGE:
            return TEXT if key == "content" else CLEAN
        raise LooksInside

    def element(self, owner: nodes.Node, place: nodes.Node) -> Holds:
        if isinstance(place, nodes.Slice):
            self.clean(place.start, place.stop, place.step)
        else:
            self.clean(place)
        holds = self.value(owner)
        if holds is LIST:
            return LIST if isinstance(place, nodes.Slice) else MESSAGE
        if holds is CLEAN:
            return CLEAN
        raise LooksInside

    def comparison(self, node: nodes.Compare) -> Holds:
        first = self.value(node.expr)
        if len(node.ops) == 1:
            operand = node.ops[0]
            if (
                operand.op in ("in", "notin")
                and isinstance(node.expr, nodes.Const)
                and self.value(operand.expr) is MESSAGE
            ):
                return CLEAN  # whether a message has that key
            if operand.op in ("eq", "ne") and first is TEXT and is_no_text(operand.expr):
                return CLEAN  # a text never equals what is none
        return self.clean(node.expr, *(operand.expr for operand in node.ops))

    def filtered(self, node: nodes.Filter, inner: nodes.Node) -> Holds:
        holds = self.value(inner)
        if holds is TEXT and node.name == "trim" and not node.args and not node.kwargs:
            self.trims = True
            return TEXT
        if holds is LIST and node.name in OF_A_LIST and not node.args:
            return OF_A_LIST[node.name]
        if holds is not CLEAN or node.name == "random" or node.dyn_args or node.dyn_kwargs:
            raise LooksInside
        return self.clean(*node.args, *(pair.value for pair in node.kwargs))

    def call(self, node: nodes.Call) -> Holds:
        if node.dyn_args or node.dyn_kwargs:
            raise LooksInside
        given = [*node.args, *(pair.value for pair in node.kwargs)]
        match node.node:
            case nodes.Name(name=name) if name in FUNCTIONS:
                return self.clean(*given)
            case nodes.Getattr(node=owner, attr="get") if self.value(owner) is MESSAGE and len(given) == 1:
                key = given[0]
                if isinstance(key, nodes.Const) and isinstance(key.value, str):
                    return self.member(owner, key.value)
            case nodes.Getattr(node=owner, attr=name) if self.value(owner) is TEXT and name in TRIMMING and not given:
                self.trims = True
                return TEXT
            case nodes.Getattr(node=owner) if self.value(owner) is CLEAN:
                return self.clean(*given)
        raise LooksInside


def either(one: Holds, other: Holds) -> Holds:
    """What may be one or the other: a content where one of them is, as less may be done with it."""
    if one is other:
        return one
    if {one, other} == {CLEAN, TEXT}:
        return TEXT
    raise LooksInside


def is_no_text(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and not isinstance(node.value, str)
