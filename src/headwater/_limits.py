"""Every limit, in one place. Times in seconds, sizes in bytes."""

from __future__ import annotations

CONTROL_BYTES = 1 << 24  # a message without its payload; a layout of 100,000 tensors fits
PAYLOAD_BYTES = 1 << 40  # no shard is larger
HANDSHAKE_S = 10.0  # from accept to a valid Hello
CLOSE_S = 5.0  # for requests that are being carried out to end when a server closes
CONNECT_S = 20.0  # until a server that is still starting must listen
BEAT_INTERVAL_S = 1.0
BEAT_LIMIT_S = 10.0  # a worker that sent no beat for so long is dead
REJOIN_S = 120.0  # a server looks for a coordinator that is started again for so long
AGAIN_S = 0.05  # between two tries to reach servers that were lost
RETURN_S = 10.0  # a worker that was sent away because a server died comes back by then, or is let go
REPORT_WAIT_S = 5.0  # a waiting worker is told for whom, this often
TERMINATE_S = 10  # from SIGTERM to a worker until it is gone, whatever its script does on its way out
SILENCE_S = 30.0  # a server that says nothing for so long, not even "waiting", is gone
FOLLOW_S = 10.0  # nor a follower for so long: less, for meanwhile its leader says nothing
HOLD_S = 120.0  # how long a reader may keep commits waiting while it saves
QUEUE_COMMITS = 16  # commits applied in one pass over memory
DESCRIPTORS = 8  # in one message
WORKERS = 1024
SERVERS = 256
PIECE_BYTES = 1 << 20  # of a push, applied and sent back while the rest still arrives
STATE_BYTES = 1 << 20  # the job's small dictionary
TABLES = 1024
ROOM_BYTES = 1 << 36  # of one batch of a table at one server
PAGE_ROWS = 1 << 16  # rows read or written at once by export and load
PAGE_BYTES = 1 << 32  # of rows that are written at once
STAGED_PUSHES = 1 << 14  # of one worker's tables between two steps
SEQUENCES = 1 << 14  # of workers' pushes to tables that are remembered
DATASETS = 1024  # that are leased
LEASES = 1024  # pieces of one dataset that one worker holds
PIECE_UNITS = 1024  # leased at once, unless the job says so
