"""One message of every kind, and the bytes it has had since protocol version 2."""

from __future__ import annotations

from headwater import asp, bsp, optim, ssp
from headwater._book import Change, Counted
from headwater._layout import TensorSpec
from headwater._leases import DataSpec, Piece
from headwater._messages import (
    AnyMessage,
    Apply,
    Assign,
    Attach,
    Attached,
    Beat,
    Changed,
    ChangesGet,
    CommitSpec,
    Committed,
    Declare,
    Declared,
    Detach,
    Done,
    Enroll,
    Failed,
    FeedLost,
    FeedTo,
    Flip,
    Flipped,
    Gather,
    Held,
    Hello,
    Here,
    Hold,
    Initialised,
    Leased,
    LeaseTake,
    Leave,
    LetWrite,
    MakeRoom,
    Normed,
    Norms,
    OpenTable,
    Page,
    PageGet,
    PagePut,
    Persist,
    Pin,
    Prepare,
    Prepared,
    Pull,
    Pulled,
    PulledRows,
    PullRows,
    Push,
    PushRows,
    Put,
    Recall,
    Recalled,
    Register,
    Registered,
    Release,
    ReplicaStats,
    Report,
    Restore,
    Restored,
    Resume,
    Room,
    Seal,
    ServedTable,
    ServerAddress,
    SetAside,
    Sides,
    SnapshotBegin,
    SnapshotGet,
    SnapshotState,
    SnapshotTake,
    SnapshotTaken,
    State,
    StateGet,
    StateSet,
    Stats,
    StatsGet,
    TableStats,
    TableStatsGet,
    Track,
    Unpin,
    Waiting,
    WarmRows,
    Welcome,
    WorkerStats,
)
from headwater._rows import RowPolicy, TableSpec, Uniform
from headwater._sealed import File

ITEMS = TableSpec("items", 2, optim.RowwiseAdagrad(lr=0.5), Uniform(0.5), 3, RowPolicy(admit_after=2), asp())

#: Never edit a line: other bytes for a message are another protocol version.
GOLDEN: list[tuple[AnyMessage, str]] = [
    (
        Hello("secret", "worker", 1 << 62, 1, 2, ssp(3), "host:42"),
        "99a548656c6c6fa6736563726574a6776f726b6572cf4000000000000000010292a373737003a7686f73743a3432c2",
    ),
    (Here(ServerAddress("tcp://[::1]:1", "", "boot/0")), "92a44865726593ad7463703a2f2f5b3a3a315d3a31a0a6626f6f742f30"),
    (
        Welcome(
            1,
            2,
            bsp(),
            (ServerAddress("tcp://127.0.0.1:7077", "unix:///s", "boot/0"),),
            "log",
            leased={"data": (7, 12)},
        ),
        (
            "99a757656c636f6d65010292a3627370009193b47463703a2f2f3132372e302e302e313a37303737a9756e69783a2f2f2f73a6626f6f742f30a3"
            "6c6f67c281a46461746192070c00"
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
            "93a852656769737465729294a177920203a7666c6f617433320094a16290a862666c6f617431360189a474797065a541"
            "64616d57a86d6178696d697a65c2a9636c69705f6e6f726dc0a26c72cb3fe0000000000000a5626574617392cb3feccc"
            "cccccccccdcb3feff7ced916872ba3657073cb3e45798ee2308c3aac7765696768745f6465636179cb3f847ae147ae14"
            "7ba7616d7367726164c2aa6b657261735f666f726dc2"
        ),
    ),
    (Registered(True, 7, 1), "96aa52656769737465726564c3070100ff"),
    (Initialised(7, (7, 6), {"epoch": b"\x03"}), "94ab496e697469616c697365640792070681a565706f6368c40103"),
    (
        Assign((TensorSpec("w", (70000,), "float64"),), optim.SGD(lr=0.5, momentum=0.25), 1, 2, asp()),
        (
            "96a641737369676e9194a17791ce00011170a7666c6f617436340089a474797065a3534744a86d6178696d697a65c2a9"
            "636c69705f6e6f726dc0a86d6f6d656e74756dcb3fd0000000000000a26c72cb3fe0000000000000a964616d70656e69"
            "6e67cb0000000000000000ac7765696768745f6465636179cb0000000000000000a86e65737465726f76c2aa6b657261"
            "735f666f726dc2010292a361737000"
        ),
    ),
    (Attach(True), "92a6417474616368c3"),
    (Attached(3), "92a8417474616368656403"),
    (Sides(3), "92a5536964657303"),
    (Detach(9), "92a644657461636809"),
    (LetWrite(9), "92a84c6574577269746509"),
    (Put("master"), "92a3507574a66d6173746572"),
    (Pull("parameters", True), "93a450756c6caa706172616d6574657273c3"),
    (Pulled(300, 2), "93a650756c6c6564cd012c02"),
    (Push(4), "92a45075736804"),
    (
        Seal(4, 2.5, ((0.5, 0.0),), b"\x80", True, "own", (("train", 9),)),
        "98a45365616c04cb40040000000000009192cb3fe0000000000000cb0000000000000000c40180c3a36f776e9192a5747261696e09",
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
    (Flipped(1), "92a7466c697070656401"),
    (Enroll(ServerAddress("", "unix:///s", "boot/0")), "94a6456e726f6c6c93a0a9756e69783a2f2f2f73a6626f6f742f30ffc2"),
    (Leave(), "91a54c65617665"),
    (Hold(True), "92a4486f6c64c3"),
    (
        Held(6, (6,), (TensorSpec("w", (1,), "float16"),), optim.Mean(), (ITEMS,)),
        "96a448656c640691069194a1779101a7666c6f617431360081a474797065a44d65616e9197a56974656d730288a474797065ae526f777769736541646167726164a86d6178696d697a65c2a9636c69705f6e6f726dc0a26c72cb3fe0000000000000a86c725f6465636179cb0000000000000000ac7765696768745f6465636179cb0000000000000000b9696e697469616c5f616363756d756c61746f725f76616c7565cb0000000000000000a3657073cb3ddb7cdfd9d7bdbb82a474797065a7556e69666f726da56c696d6974cb3fe00000000000000388ab61646d69745f616674657202ac6578706972655f7374657073c0a86578706972655f73c0a56465636179cb3ff0000000000000ac6275646765745f6279746573c0a97768656e5f66756c6ca56576696374a56576696374a36c7275ac7370696c6c5f666f6c646572c092a361737000",
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
            "9ca5537461747306cb3ff80000000000000738380192a36273700001919900a7686f73743a3432c3060002060181a46c"
            "6f7373cb40040000000000009000"
        ),
    ),
    (
        Recall("snapshot-000000000006", 1),
        "93a6526563616c6cb5736e617073686f742d30303030303030303030303601",
    ),
    (
        Recalled(6, 5),
        "93a8526563616c6c65640605",
    ),
    (
        Restore("snapshot-000000000006", 6, 1, 2, follows=True),
        "98a7526573746f7265b5736e617073686f742d303030303030303030303036060102c2c300",
    ),
    (
        Restored(b"\x01"),
        "92a8526573746f726564c40101",
    ),
    (
        Persist(Change(7, 9, {5: Counted(0, 4, 7, 7)}, ((0, 7),)), True),
        "93a7506572736973749707098105970004070700c0c391920007c0c0c0c3",
    ),
    (
        SnapshotBegin("/s/snapshot-000000000007"),
        "92ad536e617073686f74426567696eb82f732f736e617073686f742d303030303030303030303037",
    ),
    (
        Pin(b"\x01"),
        "92a350696ec40101",
    ),
    (
        SnapshotGet(),
        "91ab536e617073686f74476574",
    ),
    (
        SnapshotState(True, True, (File("model-0.safetensors", 8, "00ff"),), b"\x01"),
        "96ad536e617073686f745374617465c3c39183a46e616d65b36d6f64656c2d302e7361666574656e736f7273a5627974657308a478786833a430306666c40101a0",
    ),
    (
        Unpin(6),
        "92a5556e70696e06",
    ),
    (
        FeedTo(ServerAddress("", "unix:///f", "boot/0")),
        "92a646656564546f93a0a9756e69783a2f2f2f66a6626f6f742f30",
    ),
    (
        FeedLost(1, ServerAddress("", "unix:///f", "boot/0")),
        "93a8466565644c6f73740193a0a9756e69783a2f2f2f66a6626f6f742f30",
    ),
    (
        Apply(b"\x01", (8, 0), 1, 4),
        "95a54170706c79c401019208000104",
    ),
    (
        SnapshotTake(),
        "91ac536e617073686f7454616b65",
    ),
    (
        SnapshotTaken("/s/snapshot-000000000007", 7),
        "93ad536e617073686f7454616b656eb82f732f736e617073686f742d30303030303030303030303707",
    ),
    (
        Declare("items", 2, optim.SGD(lr=0.5)),
        (
            "98a74465636c617265a56974656d730289a474797065a3534744a86d6178696d697a65c2a9636c69705f6e6f726dc0a8"
            "6d6f6d656e74756dcb0000000000000000a26c72cb3fe0000000000000a964616d70656e696e67cb0000000000000000"
            "ac7765696768745f6465636179cb0000000000000000a86e65737465726f76c2aa6b657261735f666f726dc2c0c0c0c0"
        ),
    ),
    (
        Declared(1, ITEMS),
        (
            "93a84465636c617265640197a56974656d730288a474797065ae526f777769736541646167726164a86d6178696d697a"
            "65c2a9636c69705f6e6f726dc0a26c72cb3fe0000000000000a86c725f6465636179cb0000000000000000ac77656967"
            "68745f6465636179cb0000000000000000b9696e697469616c5f616363756d756c61746f725f76616c7565cb00000000"
            "00000000a3657073cb3ddb7cdfd9d7bdbb82a474797065a7556e69666f726da56c696d6974cb3fe00000000000000388"
            "ab61646d69745f616674657202ac6578706972655f7374657073c0a86578706972655f73c0a56465636179cb3ff00000"
            "00000000ac6275646765745f6279746573c0a97768656e5f66756c6ca56576696374a56576696374a36c7275ac737069"
            "6c6c5f666f6c646572c092a361737000"
        ),
    ),
    (
        OpenTable(1, ITEMS, 0, 2),
        (
            "95a94f70656e5461626c650197a56974656d730288a474797065ae526f777769736541646167726164a86d6178696d69"
            "7a65c2a9636c69705f6e6f726dc0a26c72cb3fe0000000000000a86c725f6465636179cb0000000000000000ac776569"
            "6768745f6465636179cb0000000000000000b9696e697469616c5f616363756d756c61746f725f76616c7565cb000000"
            "0000000000a3657073cb3ddb7cdfd9d7bdbb82a474797065a7556e69666f726da56c696d6974cb3fe000000000000003"
            "88ab61646d69745f616674657202ac6578706972655f7374657073c0a86578706972655f73c0a56465636179cb3ff000"
            "0000000000ac6275646765745f6279746573c0a97768656e5f66756c6ca56576696374a56576696374a36c7275ac7370"
            "696c6c5f666f6c646572c092a3617370000002"
        ),
    ),
    (Room(0, 65536, True), "94a4526f6f6d00ce00010000c3"),
    (PullRows(1, 0, 3, True), "95a850756c6c526f7773010003c3"),
    (PulledRows(2), "92aa50756c6c6564526f777302"),
    (WarmRows(1, 2, 3), "94a85761726d526f7773010203"),
    (PushRows(1, 4, -1, 3, (0.5,)), "96a850757368526f77730104ff0391cb3fe0000000000000"),
    (Gather(((9, 4, 0.5),)), "92a647617468657291930904cb3fe0000000000000"),
    (Track(1, "replica", True, True), "95a5547261636b01a77265706c696361c3c3"),
    (ChangesGet(1, "replica", 1 << 31), "95aa4368616e67657347657401a77265706c696361ce80000000c3"),
    (Changed(2, 1, False, True, 7), "96a74368616e6765640201c2c307"),
    (PageGet(1, 0, 65536), "94a7506167654765740100ce00010000"),
    (Page(2, -1, 7), "94a45061676502ff07"),
    (PagePut(1, 2, 7), "94a750616765507574010207"),
    (TableStatsGet(1), "92ad5461626c65537461747347657401"),
    (
        TableStats(1, 0, 99, 0, 0, 0, 7, 1, 0, 0, 0, 0, 0, 0, 2, 1),
        "dc0011aa5461626c65537461747301006300000007010000000000000201",
    ),
    (
        LeaseTake(DataSpec("train", 1000, 3, 8, 16, True, True, 7), 300, True),
        "94a94c6561736554616b6598a5747261696ecd03e8030810c3c307cd012cc3",
    ),
    (
        Leased(Piece(2, 8, 16), Registered(False, 7, 1)),
        "93a64c65617365649302081096aa52656769737465726564c2070100ff",
    ),
    (MakeRoom(), "91a84d616b65526f6f6d"),
    (SetAside(), "91a85365744173696465"),
    (Release(), "91a752656c65617365"),
    (
        ReplicaStats((ServedTable("items", 2, 3, 99, 7, 0.5, 0.25, 0.75, 5, 1, 1, 4, 8, 2),), "lost"),
        (
            "93ac5265706c6963615374617473919ea56974656d7302036307cb3fe0000000000000cb3fd0000000000000cb3fe800"
            "0000000000050101040802a46c6f7374"
        ),
    ),
]
