"""What the Rust half of the package offers; `import terrace` hands it on.

Nothing here needs torch, NumPy or an engine. Nothing waits unless its name or its `timeout_ms` says so, and what waits
lets other Python threads run meanwhile.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, final

__version__: str

@final
class Finished:
    """What became of one load or save."""

    @property
    def job(self) -> int:
        """The number the caller gave it."""
    @property
    def kind(self) -> Literal["load", "save"]: ...
    @property
    def blocks(self) -> int:
        """Blocks that arrived and were verified (load), or that the node holds now (save)."""
    @property
    def bytes(self) -> int:
        """Bytes of those blocks."""
    @property
    def failed_block_ids(self) -> list[int]:
        """The engine's blocks that did not. After a load their bytes are garbage."""
    @property
    def seconds(self) -> float:
        """From the call to the end."""
    @property
    def reason(self) -> str | None:
        """Why the first of them failed; None when none did."""
    @property
    def ok(self) -> bool:
        """True when no block failed."""

@final
class Cache:
    """One engine process's view of one namespace. Connects in the background, and again after every loss.

    `hashes` is always the engine's own hashes of the blocks 0..n of one prompt, `width` bytes each, one after the
    other; `first` says which of them a call begins with. The whole chain is passed so that every block's place in it is
    right.
    """

    def __init__(
        self,
        endpoint: str,
        spec: Mapping[str, str | int],
        *,
        owner: bytes,
        part: tuple[int, int] = (0, 0),
        parts: Sequence[tuple[int, int]] | None = None,
        token: str | None = None,
        local: str = "auto",
        strict: bool = False,
        lookup_timeout_ms: int = 200,
        transfer_timeout_ms: int = 5000,
        lease_ms: int = 10000,
        miss_ms: int = 60000,
        threads: int = 2,
        max_jobs: int = 256,
        max_lookups: int = 4096,
    ) -> None:
        """Starts, and does not wait for the node.

        endpoint: `host:port`, `http://host:port` or `unix:/path`; several nodes of one cluster with commas.
        spec: what must be equal for two engines to share bytes; `terrace.identity` makes it. Fields that are missing
            read "none" or 1, a field that is not known is refused.
        owner: 16 bytes. Leases belong to it, so give the scheduler's and the workers' caches of one engine the same.
        part: (rank, layer group) of the blocks that this process loads and saves.
        parts: parts that a lookup asks for, all of which must be present; `None`: only `part`.
        local: "auto", "off", or the path of the node's local socket.
        strict: refuse to open a namespace whose label is known with another fingerprint.

        Raises ValueError for a setting or a field that can never work.
        """
    def state(self) -> Literal["connecting", "ready", "down"]:
        """Whether lookups are asked at all. While it is not "ready", they answer 0."""
    def difference(self) -> str | None:
        """One line: what differs from the namespace last opened under this label; while not "ready", why not."""
    def path(self) -> dict[str, str | int]:
        """Which way loads and saves go: `in_use` is "local" or "grpc"; `why_grpc` says why not the other.

        The rest counts what went: `local_` and `grpc_` each with `calls`, `got_blocks`, `got_bytes`, `put_blocks`,
        `put_bytes`, and `local_failures`.
        """
    def lookup(self, request: str, hashes: bytes, width: int, first: int, probe: bool = False) -> int | None:
        """How many blocks from `first` on may be loaded. None: on its way, ask again.

        The same answer per request until `forget`. A node that is away or late answers 0, and so does a block that
        `miss` was told of. What it reports is leased, and the lease renewed, until `forget`, unless it is a probe.
        """
    def lease(self, request: str) -> int:
        """The lease of an answered lookup, for `load` in this or another process of the same owner. 0: none."""
    def forget(self, request: str) -> None:
        """Gives the lease back and forgets the answer."""
    def miss(self, hashes: bytes, width: int) -> None:
        """Lookups stop before these blocks for `miss_ms`, or until this cache has saved them again."""
    def layout(
        self, layers: Sequence[tuple[int, int, int, int]], *, device: str | None = None, stream: int = 0
    ) -> None:
        """Says where the engine's blocks lie: (address, blocks, stride_bytes, block_bytes) of each layer.

        Block i of a layer is the `block_bytes` bytes at `address + i * stride_bytes`; a block in the store is its
        layers' bytes in this order. The memory must stay mapped until `close`, or until `layout` was called again,
        which waits for the copies in hand. An empty list forgets it all.

        device: "cuda:0", "cuda:1", … where the addresses are a GPU's; "host" goes the same way in ordinary memory.
        stream: the number of the engine's stream there (`torch.cuda.current_stream().cuda_stream`). A job first waits,
            on the device, for what that stream was given before it; a load is finished when the device has written.

        Raises ValueError for layers that overlap or differ in their number of blocks, or a device that is not there.
        """
    def load(self, job: int, lease: int, hashes: bytes, width: int, first: int, block_ids: Sequence[int]) -> bool:
        """Starts to copy blocks `first`, `first + 1`, … of the chain into the engine's `block_ids`.

        False: the queue is full, and nothing was started. The engine must not use these blocks before the job is
        finished; then those in `failed_block_ids` hold garbage, and lookups stop before them.
        """
    def save(self, job: int, hashes: bytes, width: int, first: int, block_ids: Sequence[int]) -> bool:
        """Starts to store the engine's `block_ids` as blocks `first`, `first + 1`, … of the chain.

        False: the queue is full, and nothing was started. The engine must not change these blocks before
        `wait_gathered` has returned or the job is finished.
        """
    def finished(self) -> list[Finished]:
        """The jobs that ended since the last call. Each is reported once, here or by `wait`."""
    def wait_gathered(self, timeout_ms: int) -> bool:
        """Waits until no save reads the engine's memory. False: time ran out, and what was left was given up.

        Either way no save reads it any more when this returns.
        """
    def wait(self, job: int, timeout_ms: int) -> Finished | None:
        """Waits for one job. None: not finished in time, or not known."""
    def exists(
        self,
        hashes: bytes,
        width: int,
        timeout_ms: int,
        first: int = 0,
        request: str | None = None,
    ) -> int:
        """Waits for a lookup: how many blocks from `first` on are there. Late or away: 0.

        With a `request` it is leased and kept as if by `lookup`; without, only a look.
        """
    def invalidate_all(self, timeout_ms: int = 5000) -> int:
        """Forgets the whole namespace at the node, durably; how many blocks. Raises ConnectionError."""
    def stats(self) -> dict[str, int]:
        """Counters since the start; hits and bytes count what was verified here, after the last hop."""
    def close(self) -> None:
        """Ends every copy and stops the threads. Everything after it answers as if the node were away."""

@final
class Transfer:
    """Copies blocks between an engine's memory on a device and page-locked slots, and waits for it.

    The way that `Cache.layout(..., device=...)` takes, by itself, to be checked and measured. The memory and the stream
    must exist as long as this object does.
    """

    def __init__(self, device: str, layers: Sequence[tuple[int, int, int, int]], *, stream: int = 0) -> None:
        """As `Cache.layout`. Raises RuntimeError where the device is not there, or the memory is not its own."""
    @staticmethod
    def strided(
        device: str,
        addresses: Sequence[int],
        counts: tuple[int, int, int, int],
        strides: tuple[int, int, int, int],
        row_bytes: int,
        *,
        stream: int = 0,
    ) -> Transfer:
        """One tensor per layer, all of one shape: `counts` and `strides` (bytes) of K and V, blocks, tokens, heads.

        A block becomes [layer][K, V][token][head][row], whatever the tensors' own order is.
        """
    @property
    def device_name(self) -> str: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def blocks_per_batch(self) -> int:
        """Blocks that travel together."""
    def save(self, block_ids: Sequence[int]) -> bytes:
        """The blocks, one after the other."""
    def load(self, block_ids: Sequence[int], blocks: bytes) -> None:
        """Writes the blocks, all different."""
    def save_only(self, block_ids: Sequence[int]) -> None:
        """Saves into the slots and forgets: for a clock around it."""
    def load_only(self, block_ids: Sequence[int]) -> None:
        """Loads whatever the slots hold: for a clock around it."""

@final
class Client:
    """A plain, blocking client of one namespace, for people and tools.

    >>> client = terrace.Client("127.0.0.1:7070", "notes")  # doctest: +SKIP
    >>> client.put(list(range(32)), [b"first block", b"second block"])  # doctest: +SKIP
    ['written', 'written']
    >>> client.get(list(range(32)))  # doctest: +SKIP
    [b'first block', b'second block']
    """

    def __init__(
        self,
        endpoint: str = "127.0.0.1:7070",
        namespace: str | Mapping[str, str | int] = "python",
        *,
        block_tokens: int = 16,
        token: str | None = None,
        local: str = "auto",
        strict: bool = False,
        timeout_ms: int = 5000,
    ) -> None:
        """Connects and opens the namespace: a label, or a whole spec as `Cache` takes it.

        Raises ConnectionError when nobody answers in time, ValueError for a field that can never work.
        """
    @property
    def block_tokens(self) -> int:
        """Tokens per block; only full blocks have a name."""
    @property
    def difference(self) -> str | None:
        """One line: what differs from the namespace last opened under this label."""
    def put(self, tokens: Sequence[int], blocks: Sequence[bytes], *, first: int = 0) -> list[str]:
        """Stores the bytes of blocks `first`, `first + 1`, … of a prompt; what became of each."""
    def get(self, tokens: Sequence[int], *, first: int = 0) -> list[bytes]:
        """The bytes of the prompt's blocks from `first` on, up to the first that is missing. Verified."""
    def lookup(self, tokens: Sequence[int]) -> int:
        """How many of the prompt's leading blocks are there. Only a look: nothing is leased."""
    def invalidate(self, tokens: Sequence[int] | None = None) -> int:
        """Forgets the prompt's first block and all that ever followed it (None: everything); how many blocks."""
    def stats(self) -> dict[str, int]:
        """What the node holds and has done."""
    def close(self) -> None:
        """Closes the connections."""
    def __enter__(self) -> Client: ...
    def __exit__(self, *exc: object) -> None: ...
