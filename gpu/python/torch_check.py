"""Checks the way between an engine's GPU memory and page-locked slots, byte for byte, with real PyTorch tensors.

    tensors in vLLM's layouts ─ terrace.Transfer.save ─► bytes  == what torch's own indexing says
    bytes ─ terrace.Transfer.load ─► tensors                    == what torch's own indexing says, other pages untouched

On a machine with a GPU it then measures both ways beside what a person would write with torch alone. Without one it
says so, runs the same checks over the host device with tensors on the processor, measures nothing, and ends well.

`make gpu-torch` runs it; `--write gpu/MEASURED.md` puts its report behind that file's own.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import torch
except ImportError:
    print("torch_check: PyTorch is not installed in this Python; nothing was checked", file=sys.stderr)
    raise SystemExit(2) from None

from terrace import Transfer

LAYERS, BLOCKS, TOKENS = 3, 24, 16
IDS = [7, 0, 23, 11, 12, 3, 18]
HEADING = "## With PyTorch tensors"
ROUNDS = 15


def random_bytes(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """A tensor whose bytes are any bytes: copies must not care what they mean."""
    generator = torch.Generator().manual_seed(seed)
    size = list(shape)
    size[-1] *= dtype.itemsize
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype).to(device)


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in its logical order."""
    host = tensor.contiguous().cpu()
    return ctypes.string_at(host.data_ptr(), host.numel() * host.element_size())


def strides_bytes(tensor: torch.Tensor) -> list[int]:
    return [stride * tensor.element_size() for stride in tensor.stride()]


@dataclass
class Case:
    """One engine's memory, and the transfer over it."""

    name: str
    transfer: Transfer
    #: What owns the memory; other pages must not change.
    memory: list[torch.Tensor]
    #: The blocks with these ids as one tensor per group, block first, in the order of their bytes.
    blocks: Callable[[torch.Tensor], list[torch.Tensor]]
    #: Writes them.
    assign: Callable[[torch.Tensor, list[torch.Tensor]], None]


def strided(name: str, where: str, stream: int, memory: torch.Tensor, layers: list[torch.Tensor]) -> Case:
    """Layers as views [kv, block, token, head, content] of `memory`; blocks are [layer, kv, token, head, content]."""
    kv, blocks, tokens, heads, content = layers[0].shape
    steps = strides_bytes(layers[0])
    transfer = Transfer.strided(
        where,
        [layer.data_ptr() for layer in layers],
        (kv, blocks, tokens, heads),
        (steps[0], steps[1], steps[2], steps[3]),
        content * memory.element_size(),
        stream=stream,
    )

    def taken(ids: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([layer[:, ids] for layer in layers]).permute(2, 0, 1, 3, 4, 5)]

    def assign(ids: torch.Tensor, values: list[torch.Tensor]) -> None:
        for number, layer in enumerate(layers):
            layer[:, ids] = values[0][:, number].transpose(0, 1)

    return Case(name, transfer, [memory], taken, assign)


def pieces(name: str, where: str, stream: int, tensors: list[torch.Tensor]) -> Case:
    """One tensor [block, …] per layer, whose blocks are contiguous: bytes that nobody looks into."""
    layers = []
    for tensor in tensors:
        length = tensor[0].numel() * tensor.element_size()
        layers.append((tensor.data_ptr(), tensor.shape[0], tensor.stride(0) * tensor.element_size(), length))
    transfer = Transfer(where, layers, stream=stream)

    def taken(ids: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[ids] for tensor in tensors]

    def assign(ids: torch.Tensor, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor[ids] = value

    return Case(name, transfer, tensors, taken, assign)


def cases(device: torch.device, where: str, stream: int) -> Iterator[Case]:
    """vLLM's layouts on GPUs: until 0.25 by backend, since 0.26 by order, and latent attention."""
    bf16, heads, head = torch.bfloat16, 8, 128
    # FlashAttention until 0.25: [2, block, token, head, size] per layer, or heads before tokens in memory.
    for order, shape, axes in [
        ("NHD", (2, BLOCKS, TOKENS, heads, head), (0, 1, 2, 3, 4)),
        ("HND", (2, BLOCKS, heads, TOKENS, head), (0, 1, 3, 2, 4)),
    ]:
        memory = random_bytes((LAYERS, *shape), bf16, device, 1)
        views = [layer.permute(axes) for layer in memory]
        yield strided(f"FlashAttention, (2, blocks, …), {order}", where, stream, memory, views)
    # FlashInfer until 0.25: [block, 2, token, head, size].
    for order, shape, axes in [
        ("NHD", (BLOCKS, 2, TOKENS, heads, head), (1, 0, 2, 3, 4)),
        ("HND", (BLOCKS, 2, heads, TOKENS, head), (1, 0, 3, 2, 4)),
    ]:
        memory = random_bytes((LAYERS, *shape), bf16, device, 2)
        views = [layer.permute(axes) for layer in memory]
        yield strided(f"FlashInfer, (blocks, 2, …), {order}", where, stream, memory, views)
    # Since 0.26: logical [L, B, H, N, C] in one of six orders in memory, K and V side by side in C.
    sizes = dict(L=LAYERS, B=BLOCKS, H=heads, N=TOKENS, C=2 * head)
    for order in ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]:
        memory = random_bytes([sizes[axis] for axis in order], bf16, device, 3)
        logical = memory.permute([order.index(axis) for axis in "LBNHC"])
        views = [layer.unsqueeze(0) for layer in logical]
        yield strided(f"packed K and V, {order}", where, stream, memory, views)
    # The same as bytes, which is what the connector asks for where a block of a layer is contiguous.
    memory = random_bytes((LAYERS, BLOCKS, heads, TOKENS, 2 * head), bf16, device, 4)
    yield pieces("packed K and V as bytes, LBHNC", where, stream, list(memory))
    memory = random_bytes((BLOCKS, LAYERS, heads, TOKENS, 2 * head), bf16, device, 5)
    yield pieces("packed K and V as bytes, BLHNC", where, stream, list(memory.transpose(0, 1)))
    # Latent attention: one tensor [block, token, 576] per layer; 8-bit rows are 656 bytes.
    latent = [random_bytes((BLOCKS, TOKENS, 576), bf16, device, 6 + i) for i in range(LAYERS)]
    yield pieces("latent attention, 576 of bf16", where, stream, latent)
    latent = [random_bytes((BLOCKS, TOKENS, 656), torch.uint8, device, 9 + i) for i in range(LAYERS)]
    yield pieces("latent attention, 656 bytes", where, stream, latent)
    indexer = [random_bytes((BLOCKS, TOKENS, 132), torch.uint8, device, 12 + i) for i in range(LAYERS)]
    yield pieces("latent attention and its indexer", where, stream, latent + indexer)
    # Rows that only single bytes divide, from an odd address on.
    odd = random_bytes((LAYERS * BLOCKS * 2 * 5 * 3 * 7 + 1,), torch.uint8, device, 15)
    views = list(odd[1:].view(LAYERS, BLOCKS, 2, 5, 3, 7).permute(0, 2, 1, 4, 3, 5))
    yield strided("odd rows at an odd address", where, stream, odd, views)


def block_bytes_of(groups: list[torch.Tensor], strided_case: bool) -> bytes:
    """Blocks one after the other: of one tensor as it is, of several each block's parts in turn."""
    if strided_case or len(groups) == 1:
        return raw(groups[0])
    parts = [raw(group) for group in groups]
    sizes = [len(part) // len(IDS) for part in parts]
    return b"".join(
        part[block * size : (block + 1) * size]
        for block in range(len(IDS))
        for part, size in zip(parts, sizes, strict=True)
    )


def check(case: Case, device: torch.device) -> str | None:
    """What is wrong, if anything."""
    ids = torch.tensor(IDS, device=device)
    saved = case.transfer.save(IDS)
    if saved != block_bytes_of(case.blocks(ids), False):
        return "saved other bytes than torch's indexing gives"
    before = [tensor.clone() for tensor in case.memory]
    # The same blocks turned round: load them, and let torch do the same to a copy.
    length = case.transfer.block_bytes
    turned = [saved[i * length : (i + 1) * length] for i in reversed(range(len(IDS)))]
    values = [group.flip(0).clone() for group in case.blocks(ids)]
    case.transfer.load(IDS, b"".join(turned))
    synchronize(device)
    loaded = [raw(tensor) for tensor in case.memory]
    for tensor, old in zip(case.memory, before, strict=True):
        tensor.copy_(old)
    case.assign(ids, values)
    expected = [raw(tensor) for tensor in case.memory]
    if loaded != expected:
        return "loaded other bytes, or elsewhere, than torch's indexing does"
    if loaded == [raw(tensor) for tensor in before]:
        return "nothing was loaded"
    return None


def check_order(device: torch.device, where: str, stream: int) -> str | None:
    """A save must see what the engine's stream was given before it, however late that runs."""
    tensor = torch.zeros(BLOCKS, 64 << 10, dtype=torch.uint8, device=device)
    transfer = pieces("", where, stream, [tensor]).transfer
    for value in range(1, 6):
        torch.cuda._sleep(20_000_000)
        tensor.fill_(value)
        if set(transfer.save(IDS)) != {value}:
            return "a save did not wait for the engine's stream"
    return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure(device: torch.device, where: str, stream: int) -> list[str]:
    """Both ways, beside torch: gather with index_select into a pinned tensor, and back with index_copy_."""
    layers, blocks, count = 32, 1024, 128
    # 8 heads of 128, K and V, bf16, 16 tokens: 64 KiB per block and layer, 2 MiB per block.
    memory = torch.empty(layers, blocks, 8, 16, 256, dtype=torch.bfloat16, device=device)
    memory.view(torch.uint8).random_(0, 256)
    ids = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))[:count]
    on_device, listed = ids.to(device), ids.tolist()
    transfer = pieces("", where, stream, list(memory)).transfer
    pinned = torch.empty(count, layers, 8, 16, 256, dtype=torch.bfloat16, pin_memory=True)
    total = pinned.numel() * pinned.element_size()

    def torch_save() -> None:
        pinned.copy_(memory.index_select(1, on_device).transpose(0, 1).contiguous(), non_blocking=True)

    def torch_load() -> None:
        memory.index_copy_(1, on_device, pinned.to(device, non_blocking=True).transpose(0, 1))

    plain = memory.view(-1)[: pinned.numel()].view_as(pinned)
    rows: dict[str, tuple[Callable[[], object], str | None]] = {
        "plain copy to pinned memory": (lambda: pinned.copy_(plain, non_blocking=True), None),
        "save by torch: index_select, copy": (torch_save, None),
        "save by Terrace": (lambda: transfer.save_only(listed), "save by torch: index_select, copy"),
        "plain copy from pinned memory": (lambda: plain.copy_(pinned, non_blocking=True), None),
        "load by torch: copy, index_copy_": (torch_load, None),
        "load by Terrace": (lambda: transfer.load_only(listed), "load by torch: copy, index_copy_"),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for number in range(ROUNDS + 1):
        for step in range(len(names)):
            name = names[(number + step) % len(names)]
            took = seconds(rows[name][0], device)
            if number:  # the first round warms up
                times[name].append(took)
    lines = [f"copies: {count} blocks of 2 MiB, {total >> 20} MiB together, {ROUNDS} interleaved rounds, not verified"]
    for name, (_, against) in rows.items():
        rate = total / statistics.median(times[name]) / 2**30
        ratio = ""
        if against:
            ratios = sorted(theirs / ours for theirs, ours in zip(times[against], times[name], strict=True))
            # Fifteen paired ratios: the 4th and the 12th bound the median with 96 %.
            ratio = f"  {statistics.median(ratios):.2f} x torch ({ratios[3]:.2f} to {ratios[-4]:.2f})"
        lines.append(f"  {name:<38} {rate:9.1f} GiB/s{ratio}")
    return lines


def write(path: Path, report: str, headline: str) -> None:
    """Behind the file's own text, in place of an earlier report."""
    text = path.read_text() if path.exists() else "# Measured\n"
    text = text.split(f"\n{HEADING}\n")[0].rstrip("\n")
    path.write_text(f"{text}\n\n{HEADING}\n\n{headline}\n\nRepeat with `make gpu-torch`.\n\n```text\n{report}\n```\n")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="auto", help="auto, host or cuda:N")
    arguments.add_argument("--write", type=Path, help="puts the report into this file")
    options = arguments.parse_args()
    where = options.device
    if where == "auto":
        where = "cuda:0" if torch.cuda.is_available() else "host"
    device = torch.device("cpu" if where == "host" else where)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    lines = [f"date (UTC): {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}", f"torch:      {torch.__version__}"]
    failed, passed, named = 0, 0, False
    results: list[tuple[str, str | None]] = []
    for case in cases(device, where, stream):
        if not named:
            lines.append(f"device:     {case.transfer.device_name}; tensors on {device}")
            named = True
        results.append((case.name, check(case, device)))
    on_gpu = device.type == "cuda"
    late = "a save waits for what the engine's stream was given before it"
    if on_gpu:
        results.append((late, check_order(device, where, stream)))
    for name, problem in results:
        failed, passed = failed + (problem is not None), passed + (problem is None)
        lines.append(f"  FAILED  {name}: {problem}" if problem else f"  ok      {name}")
    if not on_gpu:
        lines.append(f"  --      {late}: only a GPU can show it, the processor has done everything when it returns")
    lines.insert(3, f"\nbyte for byte, both ways: {passed} of {passed + failed} passed")
    if on_gpu:
        headline = f"Run on {torch.cuda.get_device_name(device)}."
        lines += ["", *measure(device, where, stream)]
    else:
        headline = (
            "**Not run on a GPU.** PyTorch found no CUDA device here: these are tensors on the processor and the host "
            "device, and there are no rates."
        )
        lines += ["", "No CUDA device here: the host device and tensors on the processor; nothing was measured."]
    report = "\n".join(lines)
    print(report)
    if options.write:
        write(options.write, report, headline)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
