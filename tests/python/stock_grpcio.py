"""Python's own grpcio against a node: the hand-framed bulk methods are ordinary gRPC to a stranger.

Stubs are generated from proto/v1/blocks.proto, hashes and seals are computed here from the documented byte
layouts (proto/golden/README.md), and nothing of Terrace's Rust is used but the server's binary.

Usage: stock_grpcio.py PATH_TO_KVSERVER
"""

import importlib
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile

import blake3
import grpc
import xxhash
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = 64 * 1024
DEADLINE_S = 20
SPEC = {
    "label": "grpcio", "model": "m", "weights": "w", "tokenizer": "t", "kv_dtype": "f32", "layers": 1, "kv_heads": 1,
    "head_size": 64, "packing": "contiguous", "block_tokens": 16, "run_blocks": 8, "tensor_parallel": 1,
    "pipeline_parallel": 1, "context_parallel": 1, "engine_class": "python",
}  # fmt: skip


def generate_stubs(out: pathlib.Path):
    """Compiles the .proto as any user of grpcio would."""
    proto_dir = ROOT / "proto" / "v1"
    code = protoc.main(["protoc", f"-I{proto_dir}", f"--python_out={out}", f"--grpc_python_out={out}", "blocks.proto"])
    assert code == 0, "protoc failed"
    sys.path.insert(0, str(out))
    return importlib.import_module("blocks_pb2"), importlib.import_module("blocks_pb2_grpc")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def engine_hash(key: bytes, opaque: bytes) -> bytes:
    """A `SequenceHash` of an engine's own hash: proto/golden/README.md has the layout."""

    def frame(data: bytes) -> bytes:
        return struct.pack("<I", len(data)) + data

    return blake3.blake3(frame(b"terrace/other/v1") + frame(opaque), key=key).digest()


def header(pb, namespace: bytes, digest: bytes, data: bytes):
    """A block header as the first block of a chain, part {0, 0}."""
    sums = [xxhash.xxh3_64_intdigest(data[i : i + PAGE]) for i in range(0, len(data), PAGE)]
    key = namespace + digest + struct.pack("<HH", 0, 0)
    place = digest + struct.pack("<I", 0) + bytes(32)
    sealed = key + place + struct.pack("<Q", len(data)) + b"".join(struct.pack("<Q", s) for s in sums)
    return pb.BlockHeader(
        hash=digest,
        part=pb.Part(rank=0, layer_group=0),
        index=0,
        run_hash=digest,
        length_bytes=len(data),
        page_sums=sums,
        seal=xxhash.xxh3_64_intdigest(sealed),
    )


def pieces(data: bytes, size: int):
    return [data[i : i + size] for i in range(0, len(data), size)]


def main() -> int:
    server = sys.argv[1]
    passed = 0
    with tempfile.TemporaryDirectory() as tmp:
        pb, rpc = generate_stubs(pathlib.Path(tmp))
        port, http = free_port(), free_port()
        node = subprocess.Popen(
            [
                server,
                f"--data-dir={tmp}/data",
                f"--listen=127.0.0.1:{port}",
                f"--http-listen=127.0.0.1:{http}",
                "--ram-bytes=256MiB",
                "--nvme-bytes=512MiB",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            channel = grpc.insecure_channel(f"127.0.0.1:{port}")  # every default, the 4 MiB limit included
            grpc.channel_ready_future(channel).result(timeout=60)
            stub = rpc.BlocksStub(channel)
            opened = stub.OpenNamespace(pb.OpenNamespaceRequest(spec=pb.NamespaceSpec(**SPEC)), timeout=DEADLINE_S)
            assert len(opened.namespace_id) == 16 and len(opened.namespace_key) == 32
            passed += 1

            # Every size class a stock client meets: one page, odd tail, one piece, many pieces.
            for length in (1, 4096, PAGE, PAGE + 1, 1 << 20, (9 << 20) + 12345):
                data = os.urandom(length)
                digest = engine_hash(opened.namespace_key, f"block-{length}".encode())
                head = header(pb, opened.namespace_id, digest, data)
                messages = [pb.PutRequest(start=pb.PutStart(namespace_id=opened.namespace_id))]
                for i, piece in enumerate(pieces(data, 3 << 20)):
                    messages.append(pb.PutRequest(header=None if i else head, data=piece))
                put = stub.Put(iter(messages), timeout=DEADLINE_S)
                assert [r.outcome for r in put.results] == [pb.PUT_OUTCOME_CACHED], put

                chain = pb.Chain(hashes=digest)
                asked = pb.LookupRequest(namespace_id=opened.namespace_id, chain=chain)
                found = stub.Lookup(asked, timeout=DEADLINE_S)
                assert found.present_blocks == 1 and found.lease.id, found
                got, seen = bytearray(), None
                wanted = pb.GetRequest(namespace_id=opened.namespace_id, chain=chain, lease_id=found.lease.id)
                for message in stub.Get(wanted, timeout=DEADLINE_S):
                    if message.HasField("header"):
                        seen = message.header
                        assert message.outcome == pb.GET_OUTCOME_HIT
                    assert message.offset == len(got)
                    got += message.data
                assert bytes(got) == data, f"{length} bytes came back different"
                assert list(seen.page_sums) == list(head.page_sums)
                assert stub.Release(pb.ReleaseRequest(lease_id=found.lease.id), timeout=DEADLINE_S).released
                passed += 1

            # Bytes that do not match their sums are refused, and do not become visible.
            data = os.urandom(PAGE)
            digest = engine_hash(opened.namespace_key, b"torn")
            wrong = header(pb, opened.namespace_id, digest, data)
            torn = [
                pb.PutRequest(start=pb.PutStart(namespace_id=opened.namespace_id)),
                pb.PutRequest(header=wrong, data=data[:-1] + bytes([data[-1] ^ 1])),
            ]
            put = stub.Put(iter(torn), timeout=DEADLINE_S)
            assert [r.outcome for r in put.results] == [pb.PUT_OUTCOME_CORRUPT], put
            probe = pb.LookupRequest(namespace_id=opened.namespace_id, chain=pb.Chain(hashes=digest), probe=True)
            found = stub.Lookup(probe, timeout=DEADLINE_S)
            assert found.present_blocks == 0
            passed += 1

            # A hostile field is named.
            try:
                stub.Lookup(pb.LookupRequest(namespace_id=b"short", chain=pb.Chain(hashes=digest)), timeout=DEADLINE_S)
                raise AssertionError("a 5-byte namespace_id was accepted")
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
                assert "namespace_id" in error.details(), error.details()
            passed += 1
        finally:
            node.terminate()
            try:
                node.wait(timeout=30)
            except subprocess.TimeoutExpired:
                node.kill()
                raise
    print(f"{passed} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
