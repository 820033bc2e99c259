"""What a start leaves out of the standard library: it is there when it is asked for, the same as without, and whoever imports it gets the real one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAN = """
import sys
from edge_runtime.lean_imports import import_asyncio, import_logging, leave_out_openssl, leave_out_typing
logging, asyncio = import_logging(), import_asyncio()
"""

# As many lines: an error's text names them.
ORDINARY = """

import sys, asyncio, logging

"""


def said(start: str, code: str, *flags: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *flags, "-c", start + code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    return done.stdout + done.stderr


LEFT_OUT = ["traceback", "textwrap", "string", "inspect", "ast", "subprocess", "locale", "typing", "asyncio.sslproto", "asyncio.streams", "asyncio.subprocess", "asyncio.queues", "asyncio.taskgroups", "asyncio.threads"]


def test_none_of_it_is_loaded_until_it_is_asked_for() -> None:
    code = f"print([name for name in {LEFT_OUT} if name in sys.modules])"
    assert said(LEAN, code) == "[]\n"
    assert said(ORDINARY, code) == f"{[name for name in LEFT_OUT if name != 'typing' or sys.version_info < (3, 14)]}\n", "control"


USED = {
    "an error's text": """
handler = logging.StreamHandler(sys.stdout)
logging.getLogger().addHandler(handler)
try:
    {}["a"]
except KeyError:
    logging.exception("that")
""",
    "templates": """
for style, form in ("{", "{message:>5}|{levelname}"), ("$", "$message ${levelname}"), ("%", "%(message)s %(levelname)s"):
    print(logging.Formatter(form, style=style).format(logging.LogRecord("a", 20, "p", 1, "m", None, None)))
for style, form in ("{", "{message!x}"), ("{", "{0}"), ("$", "none $"), ("%", "none"):
    try:
        logging.Formatter(form, style=style)
    except ValueError as error:
        print(error)
""",
    "programs": """
async def go():
    program = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(input())", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    print(await program.communicate(b"words\\n"), program.returncode)
    shell = await asyncio.create_subprocess_shell("exit 3", stderr=asyncio.subprocess.STDOUT, stdout=asyncio.subprocess.DEVNULL)
    print(await shell.wait())
    ended = asyncio.Event()
    class Ended(asyncio.SubprocessProtocol):
        def process_exited(self):
            ended.set()
    transport, _ = await asyncio.get_running_loop().subprocess_exec(Ended, sys.executable, "-c", "input()")
    transport.get_pipe_transport(0).write(b"\\n")
    await ended.wait()
    print(transport.get_returncode(), transport.get_pipe_transport(1) is not None)
    transport.close()
asyncio.run(go())
print(asyncio.base_events.subprocess.PIPE, asyncio.base_events.subprocess.STDOUT, asyncio.base_events.subprocess.DEVNULL)
import subprocess
print(subprocess.run(["true"]).returncode, subprocess.PIPE, asyncio.subprocess.PIPE)
""",
    "streams": """
async def answer(reader, writer):
    writer.write(await reader.readline())
    await writer.drain()
    writer.close()
async def go():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"line\\n")
    print(await reader.read())
    writer.close()
    server.close()
asyncio.run(go())
""",
    "queues, groups, threads": """
async def go():
    queue = asyncio.Queue(1)
    async with asyncio.TaskGroup() as group:
        group.create_task(queue.put(1))
        group.create_task(queue.put(2))
        print(await queue.get(), await queue.get())
    print(await asyncio.to_thread(sum, [1, 2]))
    async with asyncio.timeout(5):
        pass
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 0.001)
    except TimeoutError as error:
        print(repr(error))
asyncio.run(go())
""",
    "a task's stack": """
async def inner():
    asyncio.current_task().print_stack(file=sys.stdout)
asyncio.run(inner())
""",
    "debugging": """
async def go():
    asyncio.get_running_loop().create_future().set_exception(ValueError("nobody asks"))
logging.basicConfig(stream=sys.stdout, level="ERROR", format="%(message)s")
asyncio.run(go(), debug=True)
""",
    "real modules": """
import asyncio.queues, asyncio.sslproto, asyncio.streams, asyncio.subprocess, inspect, string, subprocess, traceback, typing
print([type(module).__name__ for module in (asyncio.queues, asyncio.sslproto, asyncio.streams, asyncio.subprocess, inspect, string, subprocess, traceback, typing)])
print(asyncio.queues.Queue is asyncio.Queue, asyncio.streams.StreamReader is asyncio.StreamReader, inspect.iscoroutinefunction(asyncio.sleep), string.Template("$a").substitute(a=1))
class Point(typing.NamedTuple):
    x: int
print(Point(1), typing.get_type_hints(Point), typing.Any)
""",
    "what asyncio does not have": """
for name in "nothing", "__path__x":
    try:
        getattr(asyncio, name)
    except AttributeError as error:
        print(error)
from asyncio import Queue, subprocess, streams
print(Queue.__module__, subprocess.__name__, streams.__name__, hasattr(asyncio, "PIPE"))
""",
    "patterns": """
import json, re
print(json.loads('{"a": [1, 2.5e3, "\\\\u00e4", null]}'), json.dumps({"a": "\\u00e4\\n"}), json.JSONDecoder().decode(" 1 "), type(re.compile("a")).__name__)
try:
    json.loads("{]")
except json.JSONDecodeError as error:
    print(error)
print(json.scanner.py_make_scanner(json.JSONDecoder())('[1.5e3]', 0), json.encoder.py_encode_basestring_ascii("\\u00e4"), json.decoder.py_scanstring('a\\\\n"', 0))
""",
}


@pytest.mark.parametrize("what", USED)
def test_what_was_left_out_does_what_it_does_otherwise(what: str) -> None:
    """The same words from a start that left it out as from an ordinary one."""
    words = said(ORDINARY, USED[what])
    assert words and "SyntaxError" not in words
    assert said(LEAN, USED[what]) == words


def test_modules_of_ours_mean_the_same_without_typing() -> None:
    code = """
with leave_out_typing():
    from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar, cast
    from collections.abc import Callable
    T = TypeVar("T")
    class Face(Protocol):
        def of(self, given: Any | None, files: dict[str, BinaryIO], call: Callable[[T], T]) -> T: ...
    class One(Face):
        pass
    assert not TYPE_CHECKING and cast(int, "a") == "a" and isinstance(One(), Face)
    import edge_runtime.clock, edge_runtime.config, edge_runtime.contract.schema
    assert "typing" in sys.modules
assert "typing" not in sys.modules
import typing
assert typing.Any is not Any
stamp = edge_runtime.clock.Stamp(1, 2, "rtc")
print(stamp, stamp._replace(wall_ms=3).wall_ms, [*stamp])
"""
    assert said(LEAN, code) == "Stamp(mono_ms=1, wall_ms=2, quality='rtc') 3 [1, 2, 'rtc']\n"


def test_what_is_not_known_of_a_module_is_the_real_ones_while_it_stands_in() -> None:
    code = """
with leave_out_typing():
    from typing import Any, NamedTuple
    real = sys.modules["typing"]
print(type(real).__name__, real.NamedTuple is NamedTuple, sys.modules["typing"] is real, [type(finder).__name__ for finder in sys.meta_path if type(finder).__name__.startswith("_")])
"""
    assert said(LEAN, code) == "module True True []\n"


def test_what_was_there_before_stays() -> None:
    code = """
import traceback as before, typing
from edge_runtime.lean_imports import import_asyncio, import_logging, leave_out_typing
assert import_logging() is logging and import_asyncio() is asyncio
with leave_out_typing():
    import typing as again
print(asyncio.base_events.traceback is before, again is typing, asyncio.subprocess.__name__)
"""
    assert said(ORDINARY, code) == "True True asyncio.subprocess\n"
