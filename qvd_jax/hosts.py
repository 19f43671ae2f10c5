"""The processes of a run, one on each host: what they share out, compare and hear of each other.

Each works on its own devices, and only what is about all of them goes from one to another: by the
coordination service of `jax.distributed`, which tells who lives, and through its key-value store.
"""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

# Its key-value store has no public name; Orbax and `multihost_utils` take it from here as well.
from jax._src import distributed

from qvd_jax import accelerators
from qvd_jax.errors import InputError, first_line

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 20
"""After so many without a sign of life a process counts as dead."""

_GRACE_SECONDS = 20
"""What a process that must end has to clear away what it was writing."""

_POLL_MILLISECONDS = 1000

_FAILED = "qvd_jax/failed"


class HostsDifferError(InputError):
    """The processes do not do the same, as each finds by itself."""


class Coordinator(NamedTuple):
    """How processes find each other; all None leaves it to a TPU pod, if this is one.

    Attributes:
      address: HOST:PORT, where the first process listens.
      processes: how many there are.
      process: the number of this one.
      patience: seconds to wait for the others.
    """

    address: str | None = None
    processes: int | None = None
    process: int | None = None
    patience: int = 300


@dataclass(frozen=True)
class Hosts:
    """The processes of a run, of which this is one.

    Attributes:
      index: the number of this one.
      count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes what is about all."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of some items that are for this process."""
        return items[self.index :: self.count]

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Makes sure that all processes do the same, and waits until they have said so.

        Args:
          facts: what JSON can hold, by the name that a message gives it.

        Raises:
          HostsDifferError: something differs; it and the processes are named.
        """
        if self.count == 1:
            return
        _client().key_value_set(f"qvd_jax/facts/{self.index}", json.dumps(dict(facts)))
        first, *others = (json.loads(_wait(f"qvd_jax/facts/{i}")) for i in range(self.count))
        differing = [
            f"{name} is {_shown(other, name)} on process {number}, "
            f"{_shown(first, name)} on process 0"
            for number, other in enumerate(others, 1)
            for name in dict.fromkeys([*first, *other])
            if first.get(name) != other.get(name) or (name in first) != (name in other)
        ]
        if differing:
            raise HostsDifferError(f"the hosts differ: {'; '.join(differing)}")

    def gather(
        self, what: str, own: Sequence[Sequence[np.ndarray]], items: int
    ) -> list[list[np.ndarray]]:
        """What became of all items that were shared out, at the first process; nothing elsewhere.

        Args:
          what: its name, another at each call in a run.
          own: what became of those of this process, any number of arrays each.
          items: how many there are in all.
        """
        if self.first:
            found = {self.index + n * self.count: [*arrays] for n, arrays in enumerate(own)}
            return [found[i] if i in found else _take_all(what, i) for i in range(items)]
        for item, arrays in zip(self.share(range(items)), own, strict=True):
            for number, array in enumerate(arrays):
                _client().key_value_set_bytes(f"{_gathered(what, item)}/{number}", _to_bytes(array))
            _client().key_value_set(_gathered(what, item), str(len(arrays)))
        return []


ALONE = Hosts()


@contextlib.contextmanager
def joined(coordinator: Coordinator, again: str) -> Iterator[Hosts]:
    """The processes of this run, which end together: well, or all because one did not.

    Args:
      coordinator: how they find each other.
      again: what to do where one has died, for its message.

    Raises:
      InputError: another process failed or died; it is named.
    """
    hosts = _join(coordinator)
    if hosts.count == 1:
        yield hosts
        return
    watch = _Watch(hosts, again)
    try:
        yield hosts
        _client().key_value_set(_done(hosts.index), "")
        for index in range(hosts.count):
            _wait(_done(index))
        watch.end()
    except BaseException as error:
        watch.end()
        if isinstance(error, KeyboardInterrupt) and watch.reason is not None:
            raise InputError(watch.reason) from None
        if not isinstance(error, HostsDifferError):
            _tell(hosts, error)
        raise
    finally:
        watch.join()
        _leave(hosts)


def _join(coordinator: Coordinator) -> Hosts:
    address, processes, process, patience = coordinator
    if address is None and not _sees_tpu():
        return ALONE
    # SIGTERM is for those who clear away what is half-written.
    jax.config.update("jax_enable_preemption_service", False)
    # Without it the service ends all where one has died, in the midst of whatever they write.
    jax.config.update("jax_enable_recoverability", True)
    # By itself jax ends the process where it waits in vain, with pages of addresses.
    timer = threading.Timer(patience, _give_up, [coordinator])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            # Who is told all need not look for it.
            cluster_detection_method=None if address is None else "deactivate",
            initialization_timeout=2 * patience,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except Exception as error:  # What finds pods raises what its requests do.
        if address is not None:
            raise InputError(
                f"process {process} cannot join the others at {address}: {first_line(error)}"
            ) from error
        if jax.process_count() > 1:
            raise InputError(
                f"this is one of {jax.process_count()} hosts of a TPU, which cannot find each "
                f"other ({first_line(error)}); pass --coordinator HOST:PORT"
            ) from error
        _logger.warning("no TPU pod was found (%s): this host works alone", first_line(error))
        return ALONE
    finally:
        timer.cancel()
    return Hosts(jax.process_index(), jax.process_count())


def _sees_tpu() -> bool:
    """Whether jax is to use a TPU, of which other hosts may have parts."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    wanted = not platforms or "tpu" in platforms
    return wanted and accelerators.present(Path("/")) == accelerators.TPU


def _give_up(coordinator: Coordinator) -> None:
    address, processes, process, patience = coordinator
    if process == 0:
        what = (
            f"not all of the {processes} processes came to {address} within {patience} s; run the "
            f"same command on every host, each with its own --process-id"
        )
    else:
        what = (
            f"the coordinator {address or 'of the TPU pod'} did not answer within {patience} s; "
            f"process 0 of the same command must run there, and its port be open"
        )
    _end_at_once(what)


def _end_at_once(what: str) -> None:
    """Ends the process, whatever it waits for."""
    sys.stderr.write(f"error: {what}\n")
    sys.stderr.flush()
    os._exit(2)


class _Watch:
    """Looks after the other processes, and interrupts this one when it cannot go on.

    Attributes:
      reason: why it was interrupted; None if it was not.
    """

    def __init__(self, hosts: Hosts, again: str) -> None:
        self.reason: str | None = None
        self._hosts, self._again = hosts, again
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stops looking: from here on this process ends by itself."""
        with self._ending:
            self._ended.set()

    def join(self) -> None:
        """Waits until nobody looks."""
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.reason = self._failure()
            if self.reason is None:
                continue
            with self._ending:
                if self._ended.is_set():
                    return
                # Commands have this signal raise KeyboardInterrupt, which ends what waits, too.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self._ended.wait(_GRACE_SECONDS):
                # It compiles or computes, and writes nothing.
                _end_at_once(self.reason)

    def _failure(self) -> str | None:
        """What another process says has gone wrong, or that it says nothing any more."""
        client, everyone = _client(), range(self._hosts.count)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return client.blocking_key_value_get(_FAILED, _POLL_MILLISECONDS)
        try:
            # Returns once every process that lives has asked.
            lost = set(everyone) - set(client.get_live_nodes([*everyone]))
        except jax.errors.JaxRuntimeError as error:
            return f"the other hosts cannot be reached: {first_line(error)}"
        lost = {index for index in lost if _get(_done(index)) is None}
        if not lost:
            return None
        if (told := _get(_FAILED)) is not None:
            return told
        numbers = ", ".join(map(str, sorted(lost)))
        return (
            f"process {numbers} of {len(everyone)} has died, or its host cannot be reached; no "
            f"file is half-written: {self._again}"
        )


def _tell(hosts: Hosts, error: BaseException) -> None:
    """Tells the other processes why this one ends; if another was first, they know of that."""
    if isinstance(error, KeyboardInterrupt):
        what = "was interrupted"
    elif isinstance(error, InputError | OSError):
        what = f"ended: {error}"
    else:
        what = f"failed: {type(error).__name__}: {error}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_FAILED, f"process {hosts.index} {what}")


def _leave(hosts: Hosts) -> None:
    """Leaves the service, which ends with the first process: that one is the last to leave."""
    if hosts.first:
        everyone = [*range(hosts.count)]
        while set(_client().get_live_nodes(everyone)) != {hosts.index}:
            pass
    jax.distributed.shutdown()


def _client() -> Any:
    return distributed.global_state.client


def _done(index: int) -> str:
    return f"qvd_jax/done/{index}"


def _get(key: str) -> str | None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _client().key_value_try_get(key)
    return None


def _wait(key: str) -> str:
    """A value, once it is there; whoever waits can be interrupted."""
    while True:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return _client().blocking_key_value_get(key, _POLL_MILLISECONDS)


def _gathered(what: str, item: int) -> str:
    return f"qvd_jax/gathered/{what}/{item}"


def _take_all(what: str, item: int) -> list[np.ndarray]:
    """The arrays of an item, once they are there; the service then keeps nothing of them."""
    arrays = []
    for number in range(int(_wait(_gathered(what, item)))):
        key = f"{_gathered(what, item)}/{number}"
        data = _client().key_value_try_get_bytes(key)
        _client().key_value_delete(key)
        arrays.append(np.load(io.BytesIO(data), allow_pickle=False))
    return arrays


def _to_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return json.dumps(facts[name]) if name in facts else "missing"
