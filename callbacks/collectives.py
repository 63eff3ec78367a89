"""What the processes of a run exchange; alone, a process finds itself the first and only one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from calig.pipeline.errors import InputError
from calig.pipeline.signals import Stopped, StopSignals

T = TypeVar("T")
_END = "calig/end"


def gather(values: Sequence[Any]) -> list[Any]:
    """The lists of all processes, joined in rank order, on every process; every process must call it."""
    if not _several():
        return list(values)
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def from_first(work: Callable[[], T]) -> T:
    """What the first process gets by some work that is its alone; every process must call it.

    What ends the work ends all: the others would wait for the first one, or go on with what it has not done.

    Args:
        work: Called on the first process; gives a value that can be pickled.

    Raises:
        InputError: The work raised one.
        Stopped: A signal ended the work.
        RuntimeError: On the other processes, where the work raised anything else; the first one raises that.
    """
    if not _several():
        return work()
    answer: list[Any] = [None, None]
    error: Exception | Stopped | None = None
    if distributed.get_rank() == 0:
        try:
            answer[0] = work()
        except (Exception, Stopped) as caught:
            error = caught
            answer[1] = _for_others(caught)
    distributed.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def end_if_asked(signals: StopSignals) -> None:
    """End the run if one of the processes was asked to; every process must call it.

    Raises:
        Stopped: On all of them.
    """
    if asked := max(gather([signals.asked])):
        raise Stopped(asked)


def is_end_near(signals: StopSignals) -> bool:
    """Whether this process was asked to end, or word has come that another was; the others are told.

    No process waits for another here. After a yes every process comes to `end_if_asked`, once.
    """
    if not _several():
        return signals.asked > 0
    store = _get_default_store()
    if signals.asked:
        store.set(_END, "")
        return True
    return bool(store.check([_END]))


def leave() -> None:
    """Close the connections to the other processes, if there are any; nothing of the above is called afterwards.

    Whatever a group of gloo still runs when the interpreter ends, ends the process with an abort instead of its code.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _for_others(error: Exception | Stopped) -> Exception | Stopped:
    """An error as another process raises it; not every exception can be pickled, and these decide the exit code."""
    if isinstance(error, Stopped):
        return Stopped(error.asked)
    if isinstance(error, InputError):
        return InputError(str(error))
    return RuntimeError(f"the first process ended with {type(error).__name__}: {error}")
