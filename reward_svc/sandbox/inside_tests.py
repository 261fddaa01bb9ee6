"""Within a sandbox of their own: runs tests against a solution that is in another, and says how each went.

The verdict goes to what was standard output, which no process of the solution has. Functions and objects of the
solution are stand-ins here: calls go over the channel, and what comes back is plain data.
"""

import ast
import builtins
import importlib
import json
import os
import sys


class SolutionError(Exception):
    """The solution raised something that is no built-in exception, or answered nonsense."""


class NotPlainError(TypeError):
    """A test judges by an object of the solution, which could say whatever it likes."""


class UnsupportedError(Exception):
    """A test needs what cannot cross to the solution."""


class GoneError(Exception):
    """The solution's process has ended."""


class Link:
    """Asks the solution."""

    def __init__(self, channel):
        self._channel = channel
        self.moves = 0
        """Requests after which an object may have another length."""

    def start(self):
        return self._receive()

    def ask(self, what, target, *rest):
        """The answer's value. Raises what the solution raised."""
        answer = self.answer(what, target, *rest)
        return self._decoded(answer["v"])

    def answer(self, what, target, *rest):
        try:
            self._channel.send([what, target, *rest])
        except OSError as error:
            raise GoneError from error
        answer = self._receive()
        if not isinstance(answer, dict):
            raise SolutionError("no answer")
        self.moves += what == "call" or rest[:1] not in (("len",), ("list",))
        if "e" in answer:
            raised = _exception(*answer["e"])
            if isinstance(raised, StopIteration) and rest[:1] != ("next",):
                raise SolutionError("StopIteration")  # it would end the test's own map, and with it the test
            raise raised
        return answer

    def name(self, name):
        """(whether the solution has a name, its value)."""
        answer = self.answer("name", name)
        return (False, None) if "missing" in answer else (True, self._decoded(answer["v"]))

    def update(self, arguments, encoded):
        """Gives lists, dicts and sets the content that the call left them with."""
        for mine, theirs in zip(arguments, encoded, strict=False):
            new = self._decoded(theirs)
            if type(mine) is list and type(new) is list:
                mine[:] = new
            elif type(mine) in (dict, set) and type(new) is type(mine):
                mine.clear()
                mine.update(new)

    def encoded(self, value):
        return encode(value, _handle)

    def _decoded(self, data):
        return decode(data, lambda handle: Remote(self, handle))

    def _receive(self):
        try:
            return self._channel.receive()
        except (EOFError, OSError) as error:
            raise GoneError from error


_DIFFERENCES = ("sub", "truediv", "floordiv", "mod")
_SHOWN = ("str", "repr", "list", "getitem", "next")
_PREDICATES = frozenset(
    ["startswith", "endswith", *(name for kind in (str, set, float) for name in dir(kind) if name.startswith("is"))]
)


class Remote:
    """Stands for an object of the solution.

    The solution must not be asked how far its object is from what is expected: it would say that they are the same. So
    a difference from plain data is no plain data, and what is computed with it is none either.
    """

    def __init__(self, link, handle):
        self.__dict__.update(_link=link, _handle=handle, _difference=False, _predicate=False, _size=None)

    def __call__(self, *args, **kwargs):
        return self._call(args, kwargs, in_place=False)

    def _call(self, args, kwargs, *, in_place):
        link = self._link
        if self._predicate and not (args and _remotes(args)):
            self.__refuse()
        encoded = [link.encoded(item) for item in args], {name: link.encoded(item) for name, item in kwargs.items()}
        answer = link.answer("call", self._handle, *encoded)
        if in_place:
            link.update(args, answer.get("a", []))
        return link._decoded(answer["v"])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._link.ask("attr", self._handle, name)
        if isinstance(value, Remote):
            value.__dict__.update(_predicate=name in _PREDICATES)
        return value

    def __setattr__(self, name, value):
        self._op("setattr", name, value)

    def _op(self, name, *args):
        value = self._link.ask("op", self._handle, name, [self._link.encoded(item) for item in args])
        if (self._difference and name not in _SHOWN) or (name in _DIFFERENCES and not _remotes(args)):
            if not isinstance(value, Remote):
                self.__refuse()
            value.__dict__.update(_difference=True)
        return value

    def _must(self, kind, name):
        value = self._op(name)
        if type(value) is not kind:
            raise NotPlainError(f"{name}() gave no plain {kind.__name__}")
        return value

    def _sized(self, count):
        """Remembers how long it is. Raises NotPlainError if it was of another length before, and nothing was done."""
        before = self._size
        if before is not None and before[0] == self._link.moves and before[1] != count:
            raise NotPlainError("its length is not the number of its items")
        self.__dict__.update(_size=(self._link.moves, count))

    def __len__(self):
        value = self._must(int, "len")
        self._sized(value)
        return value

    def __str__(self):
        return self._must(str, "str")

    def __repr__(self):
        return self._must(str, "repr")

    def __iter__(self):
        items = self._must(list, "list")
        if self._size is not None:
            self._sized(len(items))
        return iter(items)

    def __next__(self):
        return self._op("next")

    def __refuse(self, *others):
        raise NotPlainError("the result is an object of the solution, not plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = __refuse
    __hash__ = object.__hash__


def _remotes(values):
    return all(isinstance(value, Remote) for value in values)


def _operation(name):
    return lambda self, *args: self._op(name, *args)


for _name in (
    "getitem",
    "setitem",
    "delitem",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "neg",
    "pos",
    "matmul",
):
    setattr(Remote, f"__{_name}__", _operation(_name))


def in_place(function, *args, **kwargs):
    """A call whose result the test throws away: it is made for what it does to its arguments."""
    if isinstance(function, Remote):
        return function._call(args, kwargs, in_place=True)
    return function(*args, **kwargs)


def _handle(value):
    if isinstance(value, Remote):
        return value._handle
    raise UnsupportedError(f"a {type(value).__name__} cannot be handed to a solution that runs elsewhere")


def _exception(name, message):
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like want more
            return SolutionError(f"{name}: {message}")
    return SolutionError(f"{name}: {message}")


class _InPlace(ast.NodeTransformer):
    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            call = node.value
            name = ast.Name("__in_place__", ast.Load())
            node.value = ast.Call(name, [call.func, *call.args], call.keywords)
        return ast.fix_missing_locations(node)


def _names(tree):
    """Names that the code reads and does not make itself."""
    read, made = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return sorted(read - made - set(dir(builtins)))


def _run(code, link):
    tree = _InPlace().visit(ast.parse(code))
    namespace = {"__name__": "tests", "__in_place__": in_place}
    for name in _names(tree):
        # What the solution calls by the name of a built-in or a module is nothing that a test should judge by.
        if name in sys.stdlib_module_names:
            namespace[name] = importlib.import_module(name)
            continue
        there, value = link.name(name)
        if there:
            namespace[name] = value
    exec(compile(tree, "tests.py", "exec"), namespace)


def _verdict(code, link):
    try:
        _run(code, link)
    except GoneError:
        return {"ok": False, "gone": True, "why": "the program ended"}
    except UnsupportedError as error:
        return {"ok": False, "unsupported": str(error)}
    except SyntaxError as error:
        return {"ok": False, "unsupported": f"the test is no Python: {error}"}
    except BaseException as error:
        return {"ok": False, "why": f"{type(error).__name__}: {error}"[:300]}
    return {"ok": True}


def run_tests(tests, link, tell):
    """Runs tests until the solution is gone."""
    try:
        begun = link.start()
    except GoneError:
        begun = {"failed": "the program ended"}
    if "failed" in begun:
        tell({"failed": str(begun["failed"])[:300]})
        return
    for code in tests:
        tell({"begin": True})
        verdict = _verdict(code, link)
        tell(verdict)
        if verdict.get("gone"):
            return


def _teller(fd):
    def tell(message):
        os.write(fd, json.dumps(message).encode() + b"\n")

    return tell


sys.set_int_max_str_digits(0)
_verdicts = os.dup(1)
quiet(1)
run_tests(PAYLOAD["tests"], Link(Channel(CONFIG["channel"])), _teller(_verdicts))
