#!/usr/bin/env python3
"""Recomputes every golden vector from README.md's byte layouts, without any Terrace code.

    python3 -m venv venv && venv/bin/pip install blake3 xxhash && venv/bin/python check.py

A stranger's implementation: written from the layouts, it shares nothing with the Rust crate but the vectors.
"""

import json
import math
import struct
import sys
from pathlib import Path

import xxhash
from blake3 import blake3

HERE = Path(__file__).parent
PAGE_BYTES = 65536


def u32(number):
    return struct.pack("<I", number)


def u64(number):
    return struct.pack("<Q", number)


def frame(data):
    return u32(len(data)) + data


def xxh3(data):
    return xxhash.xxh3_64_intdigest(data)


def block_hash(key, parent, tokens, extra_keys):
    data = frame(b"terrace/block/v1") + frame(parent)
    data += u32(len(tokens)) + b"".join(map(u32, tokens))
    data += u32(len(extra_keys)) + b"".join(map(frame, extra_keys))
    return blake3(data, key=key).digest()


def check_chain(case):
    key, size, tokens = bytes.fromhex(case["key"]), case["block_tokens"], case["tokens"]
    parent, hashes = b"", []
    for i in range(len(tokens) // size):
        extra = case["extra_keys"][i] if i < len(case["extra_keys"]) else []
        extra = [bytes.fromhex(one) for one in extra]
        parent = block_hash(key, parent, tokens[i * size : (i + 1) * size], extra)
        hashes.append(parent.hex())
    assert hashes == case["hashes"], case["name"]


def check_engine(case):
    data = frame(b"terrace/other/v1") + frame(bytes.fromhex(case["opaque"]))
    assert blake3(data, key=bytes.fromhex(case["key"])).hexdigest() == case["hash"]


def check_namespace(case):
    spec = case["spec"]
    canonical = frame(b"terrace/namespace/v1")
    for name in [
        "label", "model", "weights", "tokenizer", "kv_dtype", "layers", "kv_heads", "head_size", "packing",
        "block_tokens", "run_blocks", "tensor_parallel", "pipeline_parallel", "context_parallel",
        "engine_class",
    ]:  # fmt: skip
        value = spec[name]
        canonical += u32(value) if isinstance(value, int) else frame(value.encode())
    tenant, secret = case["tenant"].encode(), bytes.fromhex(case["secret"])
    assert canonical.hex() == case["canonical"]
    assert blake3(canonical).hexdigest() == case["fingerprint"]
    named = frame(b"terrace/namespace-id/v1") + frame(tenant) + frame(canonical)
    assert blake3(named).digest()[:16].hex() == case["id"]
    material = frame(secret) + frame(tenant) + frame(canonical)
    key = blake3(material, derive_key_context="terrace 2026-11 namespace key v1")
    assert key.hexdigest() == case["key"]


def key_bytes(key):
    packed = bytes.fromhex(key["namespace"]) + bytes.fromhex(key["hash"])
    return packed + struct.pack("<HH", key["rank"], key["layer_group"])


def place_bytes(place):
    packed = bytes.fromhex(place["run"]) + u32(place["index"])
    return packed + bytes.fromhex(place["parent"]).ljust(32, b"\0")


def check_key(vectors):
    for case in vectors["keys"]:
        assert key_bytes(case["key"]).hex() == case["bytes"] and len(case["bytes"]) == 2 * 52
    for case in vectors["places"]:
        assert place_bytes(case["place"]).hex() == case["bytes"] and len(case["bytes"]) == 2 * 68


def check_checksum(case):
    length = case["length_bytes"]
    data = bytes((167 * i + 31 * (i >> 8) + 13) % 256 for i in range(length))
    sums = [xxh3(data[at : at + PAGE_BYTES]) for at in range(0, length, PAGE_BYTES)]
    assert [f"{one:016x}" for one in sums] == case["page_sums"]
    sealed = key_bytes(case["key"]) + place_bytes(case["place"]) + u64(length) + b"".join(map(u64, sums))
    assert f"{xxh3(sealed):016x}" == case["seal"]


def ln(u):
    """Bit for bit the logarithm of placement: basic operations in a fixed order."""
    m, exponent = math.frexp(u)  # m in [0.5, 1)
    m, exponent = 2.0 * m, exponent - 1
    if m > math.sqrt(2.0):
        m, exponent = m / 2.0, exponent + 1
    s = (m - 1.0) / (m + 1.0)
    z, series = s * s, 0.0
    for k in reversed(range(12)):
        series = series * z + 1.0 / (2 * k + 1)
    return exponent * math.log(2.0) + 2.0 * s * series


def mix(x):
    """XXH3's rrmxmx: rotate, rotate, multiply, shift, multiply, shift."""
    mask, prime = 2**64 - 1, 0x9FB21C651E98DF25
    x ^= ((x << 49 | x >> 15) ^ (x << 24 | x >> 40)) & mask
    x = x * prime & mask
    x = (x ^ x >> 35) * prime & mask
    return x ^ x >> 28


def score(member, run):
    h = mix(xxh3(run) ^ xxh3(member["id"].encode()))
    u = ((h >> 12) + 0.5) / 2.0**52
    return member["weight"] / -ln(u)


JOINING, ACTIVE, DRAINING, GONE = 1, 2, 3, 4
SLACK, MOST, ROUNDS = 0.2, 3.0, 16


def lifts(shares):
    lift = {zone: 1.0 for zone in shares}
    for _ in range(ROUNDS):
        bids = 0.0
        for zone, share in shares.items():
            bids += lift[zone] * share
        rest = {zone: share / (bids - lift[zone] * share) for zone, share in shares.items()}
        both = 0.0
        for zone in shares:
            both += rest[zone]
        settled = True
        for zone, old in list(lift.items()):
            got = old * (both - rest[zone])
            wanted = min(max(got, 1.0 - SLACK), 1.0 + SLACK)
            if wanted != got:
                lift[zone] = old * min(max(wanted / got, 0.5), 2.0)
                settled = False
        if settled:
            break
    return lift


def heavy_zone(shares, lift):
    for zone, share in shares.items():
        if share * (1.0 + MOST) > MOST:
            others = 0.0
            for other in shares:
                if other != zone:
                    others += lift[other] * shares[other]
            out = MOST * (1.0 - share) / share
            return zone, (1.0 - out) / out * others / share
    return None, 0.0


def owners_of(count, ranked, run, shares):
    """The first, then whoever has the least left to wait; at the end the next at all."""
    lift, (heavy, inner) = {}, (None, 0.0)
    if len(shares) > 1:
        lift = lifts(shares)
        heavy, inner = heavy_zone(shares, lift)
    owners = ranked[:1]
    while 0 < len(owners) < min(count, len(ranked)):
        used = {owner["zone"] for owner in owners}
        left = [m for m in ranked if m not in owners]
        can = [m for m in left if m["zone"] not in used or m["zone"] == heavy]
        if can:
            start = 1.0 / score(owners[0], run)

            def wait(m, used=used, start=start):
                by = inner if m["zone"] in used else lift[m["zone"]]
                return (1.0 / score(m, run) - start) / by, m["id"].encode()

            owners.append(min(can, key=wait))
        else:
            owners.append(left[0])
    return owners


def check_placement(vectors):
    members = vectors["members"]
    ids = [member["id"].encode() for member in members]
    assert ids == sorted(ids)
    digested = b"".join(
        frame(m["id"].encode()) + u32(m["weight"]) + frame(m["zone"].encode()) + bytes([m["state"]])
        for m in members
        if m["state"] != GONE
    )
    assert f"{max(1, xxh3(digested)):016x}" == vectors["digest"]
    takers = [m for m in members if m["state"] in (JOINING, ACTIVE) and m["weight"] > 0]
    total = sum(m["weight"] for m in takers)
    shares = {}
    for zone in sorted({m["zone"] for m in takers}, key=str.encode):
        shares[zone] = sum(m["weight"] for m in takers if m["zone"] == zone) / total
    for case in vectors["runs"]:
        run = bytes.fromhex(case["run"])
        ranked = sorted(takers, key=lambda m: (-score(m, run), m["id"]))
        assert [m["id"] for m in ranked] == case["ranked"]
        assert [m["id"] for m in owners_of(3, ranked, run, shares)] == case["owners_of_3"]


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, at


def split(message):
    """The fields before `data`, and `data`."""
    at = 0
    while at < len(message):
        start = at
        tag, at = varint(message, at)
        kind = tag & 7
        assert tag >> 3 != 0
        if kind == 2:
            length, at = varint(message, at)
            if tag == 0x7A:
                assert at + length == len(message)
                return message[:start], message[at:]
            at += length
        elif kind == 0:
            assert tag >> 3 != 15
            _, at = varint(message, at)
        else:
            at += {1: 8, 5: 4}[kind]
    assert at == len(message)
    return message, b""


def check_frame(case):
    stream, at, messages, failed = bytes.fromhex(case["stream"]), 0, [], False
    try:
        while at < len(stream):
            flag, length = struct.unpack_from(">BI", stream, at)
            message = stream[at + 5 : at + 5 + length]
            assert flag == 0 and len(message) == length
            head, data = split(message)
            assert len(head) <= 1024 and len(data) <= 4096
            messages.append({"head": head.hex(), "data": data.hex()})
            at += 5 + length
    except (AssertionError, IndexError, KeyError, struct.error):
        failed = True
    assert failed == (case["error"] is not None), case["name"]
    assert messages == case["messages"], case["name"]


def main():
    each = {
        "chain": check_chain,
        "engine": check_engine,
        "namespace": check_namespace,
        "checksum": check_checksum,
        "frame": check_frame,
        "placement": check_placement,
    }
    whole = {"key": check_key}
    seen = 0
    for path in sorted(HERE.glob("*.json")):
        vectors = json.loads(path.read_text())
        if path.stem in each:
            for case in vectors:
                each[path.stem](case)
        else:
            whole[path.stem](vectors)
        seen += 1
        print(f"{path.name}: equal")
    if seen != len(each) + len(whole):
        sys.exit("vectors are missing")


if __name__ == "__main__":
    main()
