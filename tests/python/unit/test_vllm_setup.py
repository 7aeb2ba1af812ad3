"""What vLLM's connector finds out, refuses and says when an engine starts."""

from types import SimpleNamespace

import fake_vllm
import pytest

fake_vllm.install()

from terrace import identity  # noqa: E402
from terrace.vllm.setup import check, layer_span, settings_of, setup  # noqa: E402


class Tensor:
    """As much of a torch tensor as a layout needs."""

    device = SimpleNamespace(type="cpu")

    def __init__(self, shape, stride, address=4096):
        self.shape, self._stride, self._address = shape, stride, address

    def is_contiguous(self):
        packed, size = True, 1
        for length, stride in zip(reversed(self.shape), reversed(self._stride), strict=True):
            packed &= stride == size
            size *= length
        return packed

    def __getitem__(self, index):
        return Tensor(self.shape[1:], self._stride[1:])

    def stride(self, dim=None):
        return self._stride if dim is None else self._stride[dim]

    def numel(self):
        size = 1
        for length in self.shape:
            size *= length
        return size

    def element_size(self):
        return 4

    def data_ptr(self):
        return self._address


def test_a_layer_is_whole_blocks_or_refused():
    assert layer_span("a", Tensor((8, 2, 32), (64, 32, 1)), 8) == (4096, 8, 256, 256)
    assert layer_span("padded", Tensor((8, 2, 32), (100, 32, 1)), 8) == (4096, 8, 400, 256)
    assert layer_span("kernel blocks of half the size", Tensor((16, 2, 32), (64, 32, 1)), 8) == (4096, 8, 512, 512)
    for wrong in (Tensor((2, 8, 32), (256, 32, 1)), Tensor((8, 2, 32), (32, 256, 1)), Tensor((9, 2, 32), (64, 32, 1))):
        with pytest.raises(RuntimeError, match="whole blocks"):
            layer_span("wrong", wrong, 8)
    gpu = Tensor((8, 2, 32), (64, 32, 1))
    gpu.device = SimpleNamespace(type="cuda")
    with pytest.raises(RuntimeError, match="GPU"):
        layer_span("gpu", gpu, 8)


def config(device="cpu", policy="recompute", extra=None, context=1):
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy, kv_connector_extra_config=extra or {}),
        parallel_config=SimpleNamespace(decode_context_parallel_size=context, prefill_context_parallel_size=1),
    )


def groups(*names):
    return [SimpleNamespace(kv_cache_spec=type(name, (), {})()) for name in names]


def test_what_cannot_work_is_refused_at_the_start():
    check(config(), groups("FullAttentionSpec"))
    for wrong, kinds, says in (
        (config(device="cuda"), ["FullAttentionSpec"], "GPU"),
        (config(policy="fail"), ["FullAttentionSpec"], "recompute"),
        (config(), ["SlidingWindowSpec"], "full attention"),
        (config(), ["FullAttentionSpec", "MambaSpec"], "full attention"),
        (config(context=2), ["FullAttentionSpec"], "context"),
    ):
        with pytest.raises(ValueError, match=says):
            check(wrong, groups(*kinds))


def test_a_setting_nobody_knows_is_refused(monkeypatch):
    monkeypatch.setenv("TERRACE_TOKEN", "secret")
    assert settings_of(config(extra={"endpoint": "x:1"})) == {"endpoint": "x:1", "token": "secret"}
    with pytest.raises(ValueError, match="endpiont"):
        settings_of(config(extra={"endpiont": "x:1"}))


def told_at_the_start(monkeypatch, caplog, algorithm, weights="w"):
    """What an engine's log says when its connector is made."""
    monkeypatch.setattr(identity, "vllm", lambda config, caches, label: {"label": "m", "weights": weights})
    engine = config()
    engine.kv_transfer_config.engine_id = "an engine"
    engine.cache_config = SimpleNamespace(prefix_caching_hash_algo=algorithm)
    engine.parallel_config.tensor_parallel_size = engine.parallel_config.pipeline_parallel_size = 1
    caplog.clear()
    setup(engine, SimpleNamespace(kv_cache_groups=groups("FullAttentionSpec")), worker=False)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_an_engine_whose_blocks_nobody_else_can_hit_is_warned(monkeypatch, caplog):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for algorithm in ("sha256", "sha256_cbor"):
        assert told_at_the_start(monkeypatch, caplog, algorithm) == []
    for algorithm in ("xxhash", "xxhash_cbor"):
        (line,) = told_at_the_start(monkeypatch, caplog, algorithm)
        assert "nobody else can ever hit" in line and algorithm in line and "PYTHONHASHSEED" in line
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert told_at_the_start(monkeypatch, caplog, "xxhash") == []
    (line,) = told_at_the_start(monkeypatch, caplog, "sha256", weights="not found")
    assert "no weights on disk" in line
