"""A job's servers and their followers, as its coordinator knows them: who is there, and how all are spoken to at once.

Knows no lock: the coordinator holds its own, but while it asks between `begin` and `end`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from headwater._dense import Shard
from headwater._errors import HeadwaterError, PeerLostError, WaitTimeoutError
from headwater._messages import AnyMessage, Failed, ServerAddress, Waiting
from headwater._transport import Connection, Received


class Server:
    """A server or a follower. connection: on which it answers; None: it is the one in this process."""

    def __init__(self, address: ServerAddress, connections: tuple[Connection, ...]) -> None:
        self.address, self.connections = address, connections
        self.connection = connections[0] if connections else None

    @property
    def has_ended(self) -> bool:
        """Whether it has died, which nobody may have noticed yet."""
        return any(each.has_ended for each in self.connections)

    def close(self) -> None:
        """End its connections; it may come again."""
        for each in self.connections:
            each.close()


class Servers:
    """The servers of one job.

    shard: the one in this process, which is server 0. lose: is told which server is lost, and the connection that has shown it.
    """

    def __init__(self, shard: Shard | None, count: int, lose: Callable[[int, Connection], None]) -> None:
        self._shard, self._lose, self.count = shard, lose, count
        self.here: list[Server | None] = [None] * count
        self.followers: dict[int, Server] = {}  # by the index of whom they follow; those that have its state
        self.joining: dict[int, Server] = {}  # those that have not
        # By who is under way with several questions; who takes the place of one meanwhile does not know what it is about.
        self._spoken_to: list[Server | None] | None = None

    def missing(self) -> list[int]:
        """Return the indexes of those that are not there."""
        return [i for i, server in enumerate(self.here) if server is None]

    def get(self, index: int) -> Server | None:
        """Return a server, if it is there; also for an index that there is not."""
        return self.here[index] if 0 <= index < self.count else None

    def replace(self, index: int) -> bool:
        """Put a server's follower in its place; returns whether it had one. Else all followers are let go: they have what is given up."""
        server = self.here[index] = self.followers.pop(index, None)
        if server is None:
            self.drop_followers()
        return server is not None

    def lose_follower(self, index: int, connection: Connection | None = None) -> bool:
        """Let a follower go; it may come again. Returns whether there was one, and by this connection."""
        follower = self.followers.get(index) or self.joining.get(index)
        if follower is None or (connection is not None and follower.connection is not connection):
            return False
        self.followers.pop(index, None)
        follower.close()
        return True

    def drop_followers(self) -> None:
        """Let all go; they come again, and get it all."""
        for follower in self.followers.values():
            follower.close()
        self.followers.clear()

    # Speaking to them.

    @property
    def are_busy(self) -> bool:
        """Whether somebody is under way with several questions."""
        return self._spoken_to is not None

    def begin(self) -> None:
        """Let what is asked from now on go to those who are there now."""
        self._spoken_to = list(self.here)

    def end(self) -> None:
        """The last answer is there."""
        self._spoken_to = None

    def ask(self, message: AnyMessage) -> list[AnyMessage]:
        """Say something to every server; returns the answers in their order, and raises as `ask_each` does."""
        return self.ask_each(lambda _: message)

    def ask_each(self, message: Callable[[int], AnyMessage]) -> list[AnyMessage]:
        """Say something to every server, the one in this process last so that they work at the same time; answers in their order.

        Raises PeerLostError when one is lost, and any error that one answers, when all that are left have answered.
        """
        found: dict[int, AnyMessage] = {}
        remotes = []
        for i, server in enumerate(self._spoken_to or self.here):
            if server is None:
                raise PeerLostError(f"Expected every server of the job to live, got the end of server {i}.")
            if server.connection is not None:
                remotes.append((i, server.connection))
        sent = [
            (i, connection)
            for i, connection in remotes
            if self._reach(i, connection, partial(connection.send, message(i)))
        ]
        if self._shard is not None:
            try:
                found[0] = self._shard.handle(message(0))
            except HeadwaterError as error:
                found[0] = Failed(type(error).__name__, str(error))
        for i, connection in sent:
            received = self._reach(i, connection, partial(hear, connection))
            if isinstance(received, Received):
                found[i] = received.message
        for answer in found.values():
            if isinstance(answer, Failed):
                raise answer.exception()
        if len(found) < self.count:
            lost = next(i for i in range(self.count) if i not in found)
            raise PeerLostError(f"Expected every server of the job to live, got the end of server {lost}.")
        return [found[i] for i in range(self.count)]

    def _reach(self, i: int, connection: Connection, act: Callable[[], object]) -> object:
        """Send to or receive from a server; None where that shows that it is lost."""
        try:
            return act() or True
        except (PeerLostError, WaitTimeoutError):
            self._lose(i, connection)
            return None


def hear(connection: Connection) -> Received:
    """Return a server's answer, however often it says first that it is at work."""
    while isinstance((received := connection.receive()).message, Waiting):
        pass
    return received
