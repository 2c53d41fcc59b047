"""The checking process: compiles each grammar that its standard input names and answers with why not, or null.

Lines of JSON both ways. The first says which tokenizer; each other one is a StructuredOutputsParams.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.compiler import MAX_BREAKS, GrammarCompiler
from moe_runtime.grammar.library import load_xgrammar, readable
from moe_runtime.modelfiles import resolve_model
from moe_runtime.structured_outputs import StructuredOutputsParams
from moe_runtime.tokenizer import load_tokenizer

MAX_GRAMMAR_BYTES = 64 << 20  # a rank keeps a few
_MAX_MORE_BYTES = 4 << 30  # of address space, for compiling
_PARENT_CHECK_S = 1.0
# What the library ignores it only warns of, on standard error; an escaped punctuation mark is no such thing.
_WARNING, _HARMLESS = "Warning", "The character itself will be matched"


def main() -> None:
    """Answer until standard input ends."""
    os.set_inheritable(1, False)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    order = json.loads(sys.stdin.readline())
    try:
        compiler = GrammarCompiler(
            load_tokenizer(resolve_model(Path(order["files"]))), order["vocab_size"], order["end_ids"]
        )
    except ConfigError as error:
        _reply(replies, {"refusal": str(error)})
        return
    except MoeRuntimeError as error:
        _reply(replies, {"error": str(error)})
        return
    _limit_memory()
    _reply(replies, {})
    for line in sys.stdin:
        params = StructuredOutputsParams(**json.loads(line))
        _reply(replies, {"refusal": refusal_of(compiler, params, order["vocab_size"])})


def refusal_of(compiler: GrammarCompiler, params: StructuredOutputsParams, vocab_size: int) -> str | None:
    """Why the grammar cannot be served, or None."""
    with tempfile.TemporaryFile() as errors:
        saved = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            grammar = compiler.compile(params)
        except ConfigError as error:
            return str(error)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        errors.seek(0)
        printed = errors.read().decode(errors="replace")
    for line in printed.splitlines():
        if _WARNING in line and _HARMLESS not in line:
            return (
                f"structured_outputs.{params.kind} is refused, for it would not be enforced: {readable(line)}"
            )
    if grammar.memory_size_bytes > MAX_GRAMMAR_BYTES:
        return (
            f"structured_outputs.{params.kind} takes {grammar.memory_size_bytes} bytes when compiled, at most "
            f"{MAX_GRAMMAR_BYTES} are allowed; simplify it"
        )
    if not _can_begin(grammar, params, vocab_size):
        return (
            f"structured_outputs.{params.kind} is refused: no text begins as it asks, or none that the model's "
            "vocabulary can spell"
        )
    return None


def _can_begin(grammar: Any, params: StructuredOutputsParams, vocab_size: int) -> bool:
    """Whether the vocabulary has a token with which the form begins."""
    matcher = load_xgrammar().GrammarMatcher(grammar)
    if params.after is not None:  # past all that may stand before the form, so that only the form is left
        reasoned = (params.after_opening or "") + params.after + "\n" * MAX_BREAKS
        if not matcher.accept_string(reasoned):
            return False
    first = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    matcher.fill_next_token_bitmask(first)
    return bool(first.any())


def _reply(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_MORE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _leave_with(parent_pid: int) -> None:
    """Leave when the driver has died, even from within a call that does not end."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
