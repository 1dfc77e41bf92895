"""Tokenizes a split in parts: in several processes, and only the parts that are not on disk yet."""

from __future__ import annotations

import collections
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, cast

from lorax_ft.data.chat import Encoded, Encoder
from lorax_ft.data.conversation import Example
from lorax_ft.data.token_cache import TokenCache

Part = list[tuple[Example, str]]
"""Examples with their places."""

# Examples per tokenizer call: enough to keep all cores busy, few enough to keep the
# character offsets, which take far more memory than the tokens, small.
PART = 1024
# A process takes about two seconds to start, in which this one tokenizes several parts.
_FEW = 8
_MOST_PROCESSES = 32


def encode_parts(
    examples: Iterable[tuple[Example, str]],
    encoder: Encoder,
    *,
    processes: int | None = None,
    cache: TokenCache | None = None,
) -> Iterator[Encoded]:
    """Yields the samples of examples in their order, a part of them at a time.

    Args:
      examples: the examples, each with its place.
      encoder: converts them.
      processes: how many processes share the work; None: one for each core if there are more than
        8,192 examples.
      cache: where encoded parts are kept; None: nowhere.

    Raises:
      ValueError: as `encode`.
    """
    parts = _in_parts(examples)
    first = list(itertools.islice(parts, _FEW + 1))
    if processes is None:
        processes = _usable_cores() if len(first) > _FEW else 1
    parts = itertools.chain(first, parts)
    if processes == 1:
        for part in parts:
            yield _cached(part, encoder, cache)
        return
    with _Processes(encoder, processes) as pool:
        encoded: collections.deque[Future[Encoded]] = collections.deque()
        for part in parts:
            encoded.append(pool.submit(part, cache))
            if len(encoded) > 2 * processes:
                yield encoded.popleft().result()
        while encoded:
            yield encoded.popleft().result()


def _in_parts(examples: Iterable[tuple[Example, str]]) -> Iterator[Part]:
    remaining = iter(examples)
    while part := list(itertools.islice(remaining, PART)):
        yield part


def _usable_cores() -> int:
    # A container or a job may have fewer cores than the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_PROCESSES)


def _cached(part: Part, encode: Encoder | _Process, cache: TokenCache | None) -> Encoded:
    """The part as it stands in the cache, or else encoded now."""
    if cache is None:
        return encode.encode(part)
    key = cache.key(part)
    encoded = cache.read(key)
    if encoded is None:
        encoded = encode.encode(part)
        # Problems name the places of their rows, which may be others in the next run.
        if not encoded.bad:
            cache.write(key, encoded)
    return encoded


class _Processes:
    """Threads with a process each.

    Not `multiprocessing`: a forked process may deadlock, as JAX has threads, and a spawned one
    runs the main script again, which a user's own script does not expect.
    """

    def __init__(self, encoder: Encoder, processes: int) -> None:
        self._encoder = encoder
        self._local = threading.local()
        self._started: list[_Process] = []
        self._threads = ThreadPoolExecutor(processes)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        # After an error the processes are stopped at once, whatever they are at.
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._started:
            process.stop()
        self._threads.shutdown()

    def submit(self, part: Part, cache: TokenCache | None) -> Future[Encoded]:
        """Encodes a part in one of the processes."""
        return self._threads.submit(self._encode, part, cache)

    def _encode(self, part: Part, cache: TokenCache | None) -> Encoded:
        if not hasattr(self._local, "process"):
            self._local.process = _Process(self._encoder)
            self._started.append(self._local.process)
        return _cached(part, self._local.process, cache)


class _Process:
    """A process that encodes; it starts with the first part."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._process: subprocess.Popen[bytes] | None = None

    def encode(self, examples: Sequence[tuple[Example, str]]) -> Encoded:
        """As `Encoder.encode`."""
        if self._process is None:
            self._process = self._start()
        requests = cast(IO[bytes], self._process.stdin)
        answers = cast(IO[bytes], self._process.stdout)
        try:
            pickle.dump(examples, requests)
            requests.flush()
            answer = pickle.load(answers)
        except (OSError, EOFError) as error:
            status = self._process.wait()
            raise ValueError(
                f"a process that tokenizes the data ended with status {status}; if memory ran "
                "out, give data.num_proc 1"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return cast(Encoded, answer)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        # The library may be a checkout beside the running script.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        # Each process has one core.
        environment["TOKENIZERS_PARALLELISM"] = "false"
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        pickle.dump(self._encoder, cast(IO[bytes], process.stdin))
        return process


def serve() -> None:
    """Encodes the parts that the parent process sends, until it closes the pipe."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever a library prints must not end up among the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    encoder: Encoder = pickle.load(requests)
    while True:
        try:
            part: Part = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: Encoded | Exception = encoder.encode(part)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
