"""What the Rust half of the package offers; `import terrace` hands it on.

Nothing here needs torch, NumPy or an engine. Nothing waits unless its name or its `timeout_ms` says so, and what waits
lets other Python threads run meanwhile.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, final

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
    def news(self) -> tuple[bool, str] | None:
        """What is new since the last call: the node was found or lost, or is reached another way.

        Whether all is well, and a line for a log that begins with a verb.
        """
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
        """Lookups stop before these blocks for `miss_ms`, or until they were saved again, here or as `saved` says."""
    def saved(self, hashes: bytes, width: int) -> None:
        """These blocks were saved through the cache of another process: what `miss` said of them is over."""
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
    def load(
        self, job: int, lease: int, hashes: bytes, width: int, first: int, block_ids: Iterable[int] | bytes
    ) -> bool:
        """Starts to copy blocks `first`, `first + 1`, … of the chain into the engine's `block_ids`.

        block_ids: numbers; or bytes, four of them for each number, in this machine's order.

        False: the queue is full, and nothing was started. The engine must not use these blocks before the job is
        finished; then those in `failed_block_ids` hold garbage, and lookups stop before them.
        """
    def save(self, job: int, hashes: bytes, width: int, first: int, block_ids: Iterable[int] | bytes) -> bool:
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

# What the connectors decide (Rust: `connector/`). They wait for nothing and touch no block; a connector hands what they
# say to its `Cache`. `Finished` may be anything with its attributes.

COUNTERS: Final[dict[str, str]]
"""What vLLM's connector counts, and what each counter means."""

@final
class Order:
    """Blocks `first`, `first + 1`, … of one request, which a scheduler tells its workers to move. Can be pickled."""

    def __init__(
        self,
        job: int,
        request: str,
        hashes: bytes,
        width: int,
        first: int,
        block_ids: Iterable[int] | bytes,
        lease: int,
    ) -> None: ...
    @property
    def job(self) -> int: ...
    @property
    def request(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def block_ids(self) -> list[int]:
        """For tests and people; workers take the bytes."""

@final
class Planner:
    """What a scheduler loads, saves and keeps. A request is tracked from `ask` to `finished`."""

    MAX_ASKS: Final[int]
    """Steps that may pass before an answer counts as "nothing there"; the lookup's own deadline comes first."""

    def __init__(self, block_tokens: int, *, loads: bool, saves: bool, prompts_only: bool, workers: int) -> None:
        """Raises ValueError for blocks without tokens."""
    def ask(self, request: str, hashes: Sequence[bytes], tokens: int, computed: int, preemptions: int) -> bytes | None:
        """The chain to look up for a request of `tokens`, `computed` of which the engine has. None: nothing to ask.

        hashes: all that the engine knows, in order; only those that are new are read.
        """
    def answered(self, request: str, found: int | None) -> int | None:
        """The lookup's answer in blocks; the tokens to load beyond those computed. None: ask again."""
    def allocated(self, request: str, tokens: int, block_ids: Iterable[int], lease: int) -> bool:
        """`tokens` of it were taken, into these blocks. True: the lookup may be forgotten."""
    def saving(self) -> list[str]:
        """Requests of which `preempted` must be told before each step."""
    def preempted(self, request: str, preemptions: int) -> None:
        """How often it was preempted so far."""
    def fills(self, request: str, hashes: Sequence[bytes], computed: int, scheduled: int, prompt_tokens: int) -> bool:
        """A step computes `scheduled` tokens more. True: it fills blocks that are to be saved."""
    def save(self, request: str, block_ids: Iterable[int]) -> int | None:
        """Saves what `fills` has found, from the request's blocks; the job's number. None: it has found nothing."""
    def take(self) -> tuple[list[Order], list[Order], list[str], bool]:
        """The step's work, once: loads, saves, requests to be held, and whether it may reuse blocks that saves read."""
    def finished(self, request: str, preemptions: int) -> tuple[bool, bool]:
        """Whether its blocks must be kept for its saves, and whether its lookup may be forgotten."""
    def loaded(self, request: str) -> None:
        """Its load has ended."""
    def failed(self, block_ids: set[int]) -> tuple[bytes, int] | None:
        """Hashes of what these blocks were to hold, and their width, for `Cache.miss`. None: no load was at them."""
    def replied(self, job: int, workers: int, failed: Iterable[int]) -> tuple[int, int, set[int]] | None:
        """`workers` more have answered a save. When all have: its first block, its end, and those not stored."""
    def reset(self) -> None:
        """Forgets every request; saves in hand still end."""
    def counts(self) -> dict[str, float]:
        """What was counted since the last call."""
    @property
    def tracked(self) -> int:
        """Requests, aborted ones whose load has not ended included."""
    @property
    def unanswered(self) -> int:
        """Saves that not all workers have answered."""

@final
class Hauls:
    """What a worker moves for its scheduler, and what it says of it."""

    def __init__(self) -> None: ...
    def measure(self, block_bytes: int) -> None:
        """Bytes of a block: a long load becomes two jobs."""
    def load(self, orders: Sequence[Order]) -> list[tuple[int, int, bytes, int, int, bytes]]:
        """Arguments of `Cache.load` for each of their jobs."""
    def save(self, orders: Sequence[Order]) -> list[tuple[int, bytes, int, int, bytes]]:
        """Arguments of `Cache.save` for each."""
    def ended(self, finished: Finished) -> str | None:
        """A job of the cache has ended. A line for a log, where something failed."""
    def give_up(self, job: int, reason: str) -> str | None:
        """As if all of its blocks had failed."""
    def give_up_all(self, reason: str) -> list[str]:
        """As `give_up`, for all that is in hand."""
    def hold(self, requests: Sequence[str]) -> None:
        """Finished requests whose blocks wait for their saves."""
    def take_sent(self) -> set[str]:
        """Held requests whose saves have ended, each once."""
    def take_received(self) -> set[str]:
        """Requests whose load has ended, each once."""
    def take_failed(self) -> set[int]:
        """Blocks that were promised and did not come, each once."""
    def take_done(self) -> dict[int, set[int]]:
        """Saves that have ended, by the scheduler's job, and the blocks that were not stored; each once."""
    def counts(self) -> dict[str, float]:
        """What was counted since the last call."""
    @property
    def has_failed(self) -> bool:
        """True until `take_failed`: what the engine computes now may stand on garbage."""
    @property
    def loading(self) -> int:
        """Loads in hand."""
    @property
    def saving(self) -> list[int]:
        """The cache's jobs of saves in hand."""

class _Asked(Protocol):
    """As much of a `Cache` as `Chunks.lookup` needs."""

    def lookup(self, request: str, hashes: bytes, width: int, first: int) -> int | None: ...

@final
class Ending:
    """What became of one of a tier's jobs."""

    @property
    def job(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def failed(self) -> list[int]:
        """Places in the job of the keys that were not moved."""
    @property
    def dropped(self) -> int:
        """How many of those the cache never began with."""
    @property
    def reason(self) -> str | None: ...
    @property
    def forget(self) -> list[str]:
        """Lookups of no more use."""

@final
class Chunks:
    """A tier's questions and jobs. `ends`: of each key of a request, the token at which it ends.

    What must be forgotten at the cache is always in an answer.
    """

    MAX_QUESTIONS: Final[int]
    """Lookups of one request and group that are kept at a time."""

    def __init__(self, chunk_tokens: Mapping[int, int]) -> None:
        """Tokens of a chunk, by group."""
    def begin_request(self, request: str) -> None: ...
    def lookup(self, request: str, key: bytes, ends: dict[Any, int], cache: _Asked) -> bool | None:
        """Whether a node has `key`. None: on its way."""
    def begin(
        self,
        job: int,
        request: str,
        keys: Sequence[bytes],
        rows: Iterable[int],
        ends: dict[Any, int],
        promotion: bool,
    ) -> list[tuple[int, str | None, bytes, int, bytes]]:
        """Its runs, each a job of the cache: number, the lookup it is loaded under, hashes, first block, rows."""
    def ended(self, finished: Finished) -> Ending | None:
        """A run has ended; what became of its job, if it was the last."""
    def refuse(self, run: int, reason: str) -> Ending | None:
        """The cache did not begin it."""
    def give_up(self, run: int, reason: str) -> Ending | None:
        """Nobody will say how it ended."""
    def end_step(self, scheduled: Collection[str]) -> list[str]:
        """These requests were scheduled, and need their leases no more."""
    def end_request(self, request: str) -> list[str]: ...
    def reset(self) -> None:
        """Nothing that was asked so far counts any more."""
    @property
    def runs(self) -> list[int]:
        """Runs in hand."""
    @property
    def requests(self) -> int:
        """Requests that are known."""

@final
class Found:
    """Which lookups are still leased, by the pages they found. What must be let go: (pool, lookup)."""

    MAX_HELD: Final[int]
    """Leases at a time; the oldest goes first."""

    def __init__(self, hold_seconds: float) -> None: ...
    def keep(self, pool: str, request: str, names: bytes, now: float) -> list[tuple[str, str]]:
        """The lookup `request` found these pages. Those that are over by that."""
    def of(self, pool: str, name: bytes) -> str | None:
        """The lookup under whose lease a page is read."""
    def read(self, request: str, last: bytes) -> tuple[str, str] | None:
        """Pages up to `last` were read under its lease. Itself, if that was all it had found."""
    def over(self, now: float) -> list[tuple[str, str]]:
        """Those whose time is over."""
    def __len__(self) -> int: ...

def page_names(keys: Sequence[str]) -> bytes:
    """The names of pages, 32 bytes each: SGLang's own keys are SHA-256 in hexadecimal, others are hashed."""

def page_layers(
    first: Sequence[int], middle: Sequence[int], last: Sequence[int], sizes: Sequence[int], pages: int
) -> list[tuple[int, int, int, int]]:
    """Where the pieces of all pages lie, as `Cache.layout` takes it, by the addresses of those of three pages.

    Pieces that touch become one. Raises ValueError for pages that do not lie at even distances.

        page p of a pool = its pieces, piece i at  address_i + p * stride_i

        page_first     K of all layers │ V of all layers                   2 pieces
        layer_first    K of layer 0 │ V of layer 0 │ K of layer 1 …        2 pieces per layer
        state pools    temporal │ convolution 0 │ …                        1 piece each
    """
