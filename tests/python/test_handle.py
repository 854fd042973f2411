"""Lifetimes of native objects without a daemon: who is ended when, and by whom."""

from __future__ import annotations

import threading
import time

import epd
import pytest
from epd.handle import Calls, Handle


@pytest.fixture
def ended():
    return []


@pytest.fixture
def parent(ended):
    return Handle(Calls(), 1, "parent", ended.append)


def child_of(parent, pointer, release):
    with parent:
        return Handle(parent.calls, pointer, f"child {pointer}", release, parent)


def test_a_handle_is_ended_once_and_its_children_with_it_but_not_by_hand(parent, ended):
    first, second = (child_of(parent, pointer, ended.append) for pointer in (2, 3))
    first.end()
    first.end()
    parent.end()
    second.end()
    assert ended == [2, 1] and second.ended
    for handle in (parent, first, second):
        with pytest.raises(epd.Closed, match=f"{handle.what}: used after its end"), handle:
            pass


def test_an_end_waits_for_the_calls_inside_and_lets_no_other_in(parent, ended):
    child = child_of(parent, 2, ended.append)
    inside, leave = threading.Event(), threading.Event()

    def call():
        with child as pointer:
            inside.set()
            leave.wait(10)
            ended.append(f"call of {pointer}")

    threads = [threading.Thread(target=call), threading.Thread(target=parent.end)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    while not child.ended:
        time.sleep(0.001)
    with pytest.raises(epd.Closed), child:
        pass
    assert ended == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert ended == ["call of 2", 1]


def test_a_retired_handle_ends_after_the_call_in_which_the_thread_is(parent, ended):
    inner, outer = (child_of(parent, pointer, ended.append) for pointer in (2, 3))
    with parent:
        parent.calls.retire(inner)
        with pytest.raises(epd.Closed), parent_of_nothing(parent):
            pass
        assert ended == []
    assert ended == [2]
    parent.calls.retire(outer)
    assert ended == [2, 3]


def parent_of_nothing(parent):
    """A handle of the same client that has ended."""
    handle = child_of(parent, 9, lambda pointer: None)
    handle.end()
    return handle


def test_another_threads_call_does_not_delay_a_retired_handle(parent, ended):
    child = child_of(parent, 2, ended.append)
    with parent:
        thread = threading.Thread(target=parent.calls.retire, args=(child,))
        thread.start()
        thread.join(10)
        assert ended == [2]


def test_a_refused_end_leaves_the_handle_as_it_was(parent, ended):
    refusals = [epd.InUse("bound")]

    def release(pointer):
        if refusals:
            raise refusals.pop()
        ended.append(pointer)

    child = child_of(parent, 2, release)
    with pytest.raises(epd.InUse):
        child.end()
    with child as pointer:
        assert pointer == 2
    refusals.append(epd.InUse("bound"))
    parent.calls.retire(child)  # of a collected owner: nobody to tell
    assert ended == [] and not child.ended
    child.end()
    assert ended == [2]
