"""One message of every kind, and the bytes it has had since protocol version 1."""

from __future__ import annotations

from headwater import asp, bsp, optim, ssp
from headwater._layout import TensorSpec
from headwater._messages import (
    AnyMessage,
    Assign,
    Attach,
    Attached,
    Beat,
    CommitSpec,
    Committed,
    Detach,
    Done,
    Enroll,
    Failed,
    Flip,
    Held,
    Hello,
    Here,
    Hold,
    Initialised,
    Leave,
    Normed,
    Norms,
    Prepare,
    Prepared,
    Pull,
    Pulled,
    Push,
    Put,
    Register,
    Registered,
    Report,
    Resume,
    Seal,
    ServerAddress,
    State,
    StateGet,
    StateSet,
    Stats,
    StatsGet,
    Waiting,
    Welcome,
    WorkerStats,
)

#: Never edit a line: other bytes for a message are another protocol version.
GOLDEN: list[tuple[AnyMessage, str]] = [
    (
        Hello("secret", "worker", 1 << 62, 1, 2, ssp(3), "host:42"),
        "98a548656c6c6fa6736563726574a6776f726b6572cf4000000000000000010292a373737003a7686f73743a3432",
    ),
    (Here(ServerAddress("tcp://[::1]:1", "", "boot/0")), "92a44865726593ad7463703a2f2f5b3a3a315d3a31a0a6626f6f742f30"),
    (
        Welcome(1, 2, bsp(), (ServerAddress("tcp://127.0.0.1:7077", "unix:///s", "boot/0"),)),
        (
            "95a757656c636f6d65010292a3627370009193b47463703a2f2f3132372e302e302e313a37303737a9756e69783a2f2f"
            "2f73a6626f6f742f30"
        ),
    ),
    (Failed("LayoutError", "Expected é."), "93a64661696c6564ab4c61796f75744572726f72ac457870656374656420c3a92e"),
    (Done(), "91a4446f6e65"),
    (
        Waiting(5.5, ("worker 1 (host:42)",)),
        "93a757616974696e67cb401600000000000091b2776f726b657220312028686f73743a343229",
    ),
    (Beat(), "91a442656174"),
    (
        Register((TensorSpec("w", (2, 3), "float32"), TensorSpec("b", (), "bfloat16", 1)), optim.AdamW(lr=0.5)),
        (
            "93a852656769737465729294a177920203a7666c6f617433320094a16290a862666c6f617431360188a474797065a541"
            "64616d57a86d6178696d697a65c2a9636c69705f6e6f726dc0a26c72cb3fe0000000000000a5626574617392cb3feccc"
            "cccccccccdcb3feff7ced916872ba3657073cb3e45798ee2308c3aac7765696768745f6465636179cb3f847ae147ae14"
            "7ba7616d7367726164c2"
        ),
    ),
    (Registered(True, 7, 1), "94aa52656769737465726564c30701"),
    (Initialised(7, (7, 6), {"epoch": b"\x03"}), "94ab496e697469616c697365640792070681a565706f6368c40103"),
    (
        Assign((TensorSpec("w", (70000,), "float64"),), optim.SGD(lr=0.5, momentum=0.25), 1, 2, asp()),
        (
            "96a641737369676e9194a17791ce00011170a7666c6f617436340088a474797065a3534744a86d6178696d697a65c2a9"
            "636c69705f6e6f726dc0a86d6f6d656e74756dcb3fd0000000000000a26c72cb3fe0000000000000a964616d70656e69"
            "6e67cb0000000000000000ac7765696768745f6465636179cb0000000000000000a86e65737465726f76c2010292a361"
            "737000"
        ),
    ),
    (Attach(True), "92a6417474616368c3"),
    (Attached(3), "92a8417474616368656403"),
    (Detach(9), "92a644657461636809"),
    (Put("master"), "92a3507574a66d6173746572"),
    (Pull("parameters", True), "93a450756c6caa706172616d6574657273c3"),
    (Pulled(300), "92a650756c6c6564cd012c"),
    (Push(4), "92a45075736804"),
    (
        Seal(4, 2.5, ((0.5, 0.0),), b"\x80", True, "own"),
        "97a45365616c04cb40040000000000009192cb3fe0000000000000cb0000000000000000c40180c3a36f776e",
    ),
    (
        Committed(5, 5, 1, 2, 0, Failed("NonFiniteError", "NaN")),
        "97a9436f6d6d6974746564050501020093a64661696c6564ae4e6f6e46696e6974654572726f72a34e614e",
    ),
    (
        Prepare(6, (CommitSpec(((9, 4),), b"\0\0\0\0", ((0.5,),), b"\0\0\0\0\0\0\xf0?"),), True),
        "94a75072657061726506919491920904c404000000009191cb3fe0000000000000c408000000000000f03fc3",
    ),
    (
        Prepared((0, 1, 2, 3), b"\0\0\0\0\0\0\xf0?"),
        "93a850726570617265649400010203c408000000000000f03f",
    ),
    (
        Norms(CommitSpec(((9, 4), (8, 4)), b"\xff\xff\xff\xff", (), b"")),
        "92a54e6f726d739492920904920804c404ffffffff90c400",
    ),
    (Normed(b"\0\0\0\0\0\0\xf0?"), "92a64e6f726d6564c408000000000000f03f"),
    (Flip(6, True), "93a4466c697006c3"),
    (Enroll(ServerAddress("", "unix:///s", "boot/0")), "92a6456e726f6c6c93a0a9756e69783a2f2f2f73a6626f6f742f30"),
    (Leave(), "91a54c65617665"),
    (Hold(), "91a4486f6c64"),
    (
        Held(6, (6,), (TensorSpec("w", (1,), "float16"),), optim.Mean()),
        "95a448656c640691069194a1779101a7666c6f617431360081a474797065a44d65616e",
    ),
    (Resume(), "91a6526573756d65"),
    (StateGet(), "91a85374617465476574"),
    (State({"epoch": b"\x03"}), "92a5537461746581a565706f6368c40103"),
    (StateSet("epoch", None), "93a85374617465536574a565706f6368c0"),
    (Report({"loss": 2.5}), "92a65265706f727481a46c6f7373cb4004000000000000"),
    (StatsGet(), "91a85374617473476574"),
    (
        Stats(6, 1.5, 7, 56, 56, 1, bsp(), 1, (WorkerStats(0, "host:42", True, 6, 0, 2, 6, 1, {"loss": 2.5}),)),
        (
            "9aa5537461747306cb3ff80000000000000738380192a36273700001919900a7686f73743a3432c3060002060181a46c"
            "6f7373cb4004000000000000"
        ),
    ),
]
