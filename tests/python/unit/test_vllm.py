"""vLLM's connector, both halves, against a node in plain Python and an engine played by the test."""

import pickle
from types import SimpleNamespace

import fake_vllm
from fake_cache import FakeCache, FakeNode
from fake_vllm import KVCacheBlocks, KVConnectorBlockState, KVConnectorOutput, Request, SchedulerOutput

fake_vllm.install()

from terrace._terrace import COUNTERS, Planner  # noqa: E402
from terrace.vllm.scheduler import Scheduler  # noqa: E402
from terrace.vllm.stats import TerraceMetrics, TerraceStats  # noqa: E402
from terrace.vllm.step import Saved  # noqa: E402
from terrace.vllm.worker import Worker  # noqa: E402

BLOCK = 4


class Engine:
    """A scheduler, its workers and their KV. `step` is one engine step; the caches' threads run when the test says."""

    def __init__(self, node=None, *, role="kv_both", workers=1, draft=False, slow=0, events=True, max_jobs=256):
        self.node = node or FakeNode()
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(
                is_kv_consumer=role != "kv_producer", is_kv_producer=role != "kv_consumer"
            ),
            kv_events_config=SimpleNamespace(enable_kv_cache_events=events),
            speculative_config=object() if draft else None,
            parallel_config=SimpleNamespace(world_size=workers),
        )
        parts = [(rank, 0) for rank in range(workers)]
        self.memory = [{} for _ in parts]
        self.scheduler = Scheduler(
            lambda generation: FakeCache(self._node(generation), parts=parts, slow=slow), config, BLOCK
        )
        self.workers = [
            Worker(lambda generation, rank=rank: FakeCache(
                self._node(generation), self.memory[rank], part=(rank, 0), max_jobs=max_jobs), 64)
            for rank in range(workers)
        ]  # fmt: skip
        self.tables = {}
        self.before = lambda worker: None

    def _node(self, generation):
        return self.node if not generation else FakeNode()

    def admit(self, request, ids, computed=0):
        """The scheduler's first look at a request: tokens to load, or None."""
        tokens, asynchronous = self.scheduler.matched(request, computed)
        if tokens is None:
            return None
        assert asynchronous == (tokens > 0)
        self.tables[request.request_id] = ids
        request.num_computed_tokens = computed + tokens
        self.scheduler.allocated(request, KVCacheBlocks(ids), tokens)
        return tokens

    def step(self, scheduled=None, *, run=True):
        """One step: `scheduled` maps requests to tokens. Returns what the workers said."""
        scheduled = scheduled or {}
        output = SchedulerOutput(
            {request.request_id: tokens for request, tokens in scheduled.items()}, KVConnectorBlockState(self.tables)
        )
        step = pickle.loads(pickle.dumps(self.scheduler.plan(output)))
        answers = []
        for worker, memory in zip(self.workers, self.memory, strict=True):
            worker.before(step)
            self.before(worker)
            for request, tokens in scheduled.items():
                for i in range(request.num_computed_tokens // BLOCK, (request.num_computed_tokens + tokens) // BLOCK):
                    memory[self.tables[request.request_id][i]] = b"kv" + request.block_hashes[i]
            worker.start_loads(step)
            worker.start_saves(step)
            if run:
                worker.cache.run()
            sent, received = worker.finished()
            answers.append((sent, received, worker.failed(), worker.done()))
        for request, tokens in scheduled.items():
            request.num_computed_tokens += tokens
        meta = None
        for answer in answers:
            if answer[3] is not None:
                meta = answer[3] if meta is None else meta.aggregate(answer[3])
        failed = set().union(*(answer[2] for answer in answers))
        said = KVConnectorOutput(answers[0][0], answers[0][1], failed, meta)
        self.scheduler.update(said)
        return said


def request(name="r", tokens=18, **more):
    return Request(name, list(range(100, 100 + tokens)), BLOCK, **more)


def warm(tokens=18):
    """A node that holds the prompt's blocks."""
    engine, first = Engine(), request(tokens=tokens)
    assert engine.admit(first, [0, 1, 2, 3, 4]) == 0
    engine.step({first: tokens})
    engine.step()
    return engine.node


def stats(half):
    return half.counts()


def test_what_one_engine_saves_another_loads():
    node = warm()
    assert len(node.blocks) == 4
    engine, second = Engine(node), request()
    assert engine.admit(second, [9, 8, 7, 6, 5]) == 16
    said = engine.step()
    assert said.finished_recving == {"r"} and not said.invalid_block_ids
    assert [engine.memory[0][i] for i in (9, 8, 7, 6)] == [b"kv" + h for h in second.block_hashes]
    assert node.leases == {}, "the lease is given back when the load has ended"
    assert stats(engine.workers[0]) | {"load_seconds": 0} == {
        "loads": 1, "loaded_blocks": 4, "loaded_bytes": 40, "load_seconds": 0, "failed_blocks": 0
    }  # fmt: skip


def test_the_last_token_is_always_computed():
    node = warm(tokens=16)
    assert len(node.blocks) == 4
    assert Engine(node).admit(request(tokens=16), [0, 1, 2, 3]) == 12


def test_a_lookup_on_its_way_is_asked_again_and_then_given_up():
    engine = Engine(warm(), slow=2)
    assert engine.admit(request(), [0, 1, 2, 3, 4]) is None
    assert engine.admit(request(), [0, 1, 2, 3, 4]) is None
    assert engine.admit(request(), [0, 1, 2, 3, 4]) == 16
    engine = Engine(warm(), slow=10 * Planner.MAX_ASKS)
    late = request()
    assert [engine.scheduler.matched(late, 0)[0] for _ in range(Planner.MAX_ASKS)][-2:] == [None, 0]
    assert stats(engine.scheduler) == {"lookups_given_up": 1}


def test_only_what_the_engine_lacks_is_loaded():
    engine = Engine(warm())
    assert engine.admit(request(), [0, 1, 2, 3, 4], computed=8) == 8
    ((load, *_), *_) = engine.scheduler.planner.take()
    assert (load.first, load.block_ids) == (2, [2, 3])


def test_what_the_node_lost_is_saved_again_from_the_engines_own_cache():
    engine, again = Engine(), request()
    engine.memory[0].update({i: b"kv" + h for i, h in enumerate(again.block_hashes)})
    assert engine.admit(again, [0, 1, 2, 3, 4], computed=12) == 0
    engine.step({again: 6})
    assert len(engine.node.blocks) == 4


def test_a_failed_load_is_reported_and_missed_from_then_on():
    node = warm()
    engine, second = Engine(node), request()
    engine.workers[0].cache.bad = {second.block_hashes[2]}
    assert engine.admit(second, [9, 8, 7, 6, 5]) == 16
    said = engine.step()
    assert said.invalid_block_ids == {7} and said.finished_recving == {"r"}
    assert node.leases == {}
    assert engine.scheduler.matched(request("next"), 0) == (8, True), "the lookup stops before the bad block"
    # vLLM takes the request back to the valid prefix; what is computed then is saved, though its blocks once were hits.
    second.num_computed_tokens = 8
    del node.blocks[(0, 0), second.block_hashes[2]]
    engine.step({second: 10})
    assert node.blocks[(0, 0), second.block_hashes[2]] == b"kv" + second.block_hashes[2]
    assert engine.scheduler.matched(request("later"), 0) == (16, True), "saved again, so promised again"


def test_a_step_that_saw_a_failure_saves_nothing():
    engine, second, other = Engine(warm()), request(), Request("other", list(range(8)), BLOCK)
    engine.workers[0].cache.bad = {second.block_hashes[0]}
    engine.admit(second, [9, 8, 7, 6, 5])
    engine.admit(other, [20, 21])
    engine.step(run=False)
    engine.before = lambda worker: worker.cache.run()  # the load fails during the forward
    said = engine.step({other: 8})
    assert said.invalid_block_ids == {9}
    assert len(engine.node.blocks) == 4, "nothing of this step was stored"
    assert stats(engine.workers[0])["dropped_blocks"] == 2


def test_the_saved_mark_goes_back_when_vllm_takes_tokens_back():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 16})
    engine.node.blocks.clear()
    first.num_computed_tokens = 4
    engine.step({first: 12})
    assert len(engine.node.blocks) == 3


def test_a_full_queue_is_a_failed_load_and_a_dropped_save():
    node = warm()
    engine, second = Engine(node, max_jobs=0), request()
    engine.admit(second, [9, 8, 7, 6, 5])
    said = engine.step()
    assert said.invalid_block_ids == {9, 8, 7, 6} and said.finished_recving == {"r"}
    node.blocks.clear()
    second.num_computed_tokens = 0
    said = engine.step({second: 18})
    assert not node.blocks and said.kv_connector_worker_meta is not None


def long_load(**settings):
    """An engine that loads four blocks of 16 MiB, and its worker."""
    engine = Engine(warm(), **settings)
    engine.workers[0].hauls.measure(16 << 20)
    assert engine.admit(request(), [9, 8, 7, 6, 5]) == 16
    return engine, engine.workers[0]


def test_a_long_load_is_two_jobs_and_ends_with_the_second():
    engine, worker = long_load()
    assert not engine.step(run=False).finished_recving
    assert [ids for *_, ids in worker.cache.queue] == [[9, 8], [7, 6]]
    first = worker.cache.queue.pop(0)
    assert not engine.step().finished_recving
    worker.cache.queue.append(first)
    said = engine.step()
    assert said.finished_recving == {"r"} and not said.invalid_block_ids
    assert [engine.memory[0][i] for i in (9, 8, 7, 6)] == [b"kv" + h for h in request().block_hashes]
    assert stats(worker) == {
        "loads": 1, "loaded_blocks": 4, "loaded_bytes": 40, "load_seconds": 0.5, "failed_blocks": 0
    }  # fmt: skip


def test_what_a_half_of_a_long_load_lacks_is_said_when_both_have_ended():
    engine, worker = long_load(max_jobs=1)
    worker.cache.bad = {request().block_hashes[1]}
    said = engine.step(run=False)
    assert not said.invalid_block_ids and not said.finished_recving, "the second half was refused; the first runs"
    said = engine.step()
    assert said.invalid_block_ids == {8, 7, 6} and said.finished_recving == {"r"}
    assert not worker.hauls.loading and stats(worker)["failed_blocks"] == 3


def test_blocks_of_a_finished_request_are_kept_while_a_save_reads_them():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 18}, run=False)
    assert engine.scheduler.finished(first)
    assert engine.step(run=False).finished_sending == set()
    said = engine.step()
    assert said.finished_sending == {"r"}
    assert engine.step().finished_sending == set(), "reported once"


def test_blocks_are_not_kept_without_a_save():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 18})
    engine.step()
    assert not engine.scheduler.finished(first)
    assert engine.step().finished_sending == set()


def test_a_preempted_requests_saves_end_before_its_blocks_are_written():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 18}, run=False)
    first.num_preemptions, first.num_computed_tokens = 1, 0
    other = Request("other", list(range(20)), BLOCK)
    engine.admit(other, [0, 1, 2, 3, 4])
    engine.step({other: 20}, run=False)
    assert "gathered" in engine.workers[0].cache.log
    for block in first.block_hashes:
        assert engine.node.blocks[(0, 0), block] == b"kv" + block
    assert not engine.scheduler.finished(first), "nothing reads its blocks any more"


def test_no_step_waits_without_a_preemption():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 18}, run=False)
    engine.step(run=False)
    assert "gathered" not in engine.workers[0].cache.log


def test_an_abort_during_a_load_gives_the_lease_back_when_it_has_ended():
    node = warm()
    engine, second = Engine(node), request()
    engine.admit(second, [9, 8, 7, 6, 5])
    engine.step(run=False)
    assert not engine.scheduler.finished(second), "vLLM itself keeps blocks that a load writes to"
    assert len(node.leases) == 1
    assert engine.step().finished_recving == {"r"}
    assert node.leases == {} and not engine.scheduler.planner.tracked


def test_an_abort_before_the_load_gives_the_lease_back_at_once():
    node = warm()
    engine, second = Engine(node), request()
    assert engine.scheduler.matched(second, 0) == (16, True)
    assert len(node.leases) == 1
    assert not engine.scheduler.finished(second)
    assert node.leases == {}


def test_a_node_away_is_a_miss_and_saves_are_not_even_planned():
    node = warm()
    node.away = True
    engine, second = Engine(node), request()
    assert engine.admit(second, [9, 8, 7, 6, 5]) == 0
    engine.step({second: 18})
    assert engine.scheduler.planner.unanswered == 0
    node.away = False
    assert engine.scheduler.matched(request("next"), 0) == (16, True), "used again when it is back"


def test_a_block_of_two_requests_is_saved_once():
    engine, one, two = Engine(), request("one"), request("two")
    engine.admit(one, [0, 1, 2, 3, 4])
    engine.admit(two, [0, 1, 2, 3, 5])
    engine.step({one: 18, two: 18}, run=False)
    assert len(engine.workers[0].hauls.saving) == 1


def test_generated_blocks_are_saved_too_but_not_drafts():
    for draft, expected in ((False, 5), (True, 4)):
        engine, first = Engine(draft=draft), request()
        engine.admit(first, [0, 1, 2, 3, 4])
        engine.step({first: 18})
        first.grow(1, 2)
        engine.step({first: 2})
        assert len(engine.node.blocks) == expected


def test_requests_with_an_adapter_are_left_alone():
    engine = Engine(warm())
    tuned = request(lora_request=object())
    assert engine.admit(tuned, [9, 8, 7, 6, 5]) == 0
    engine.node.blocks.clear()
    engine.step({tuned: 18})
    assert not engine.node.blocks


def test_a_producer_loads_nothing_and_a_consumer_saves_nothing():
    node = warm()
    producer = Engine(node, role="kv_producer")
    assert producer.admit(request(), [0, 1, 2, 3, 4]) == 0
    assert node.leases == {}
    consumer, first = Engine(role="kv_consumer"), request()
    consumer.admit(first, [0, 1, 2, 3, 4])
    consumer.step({first: 18})
    assert not consumer.node.blocks


def test_events_tell_of_stored_blocks_only():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 18})
    events = engine.scheduler.take_events()
    assert [event.block_hashes for event in events] == [[h] for h in first.block_hashes]
    assert [event.parent_block_hash for event in events] == [None, *first.block_hashes[:3]]
    assert events[1].token_ids == first.tokens[4:8] and events[1].medium == "STORAGE"
    assert engine.scheduler.take_events() == []


def test_two_workers_must_both_have_stored_a_block():
    engine, first = Engine(workers=2), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.workers[1].cache.max_jobs = 0
    engine.step({first: 18})
    assert engine.scheduler.take_events() == [] and engine.scheduler.planner.unanswered == 0
    assert engine.scheduler.matched(request("next"), 0) == (0, False), "one part is missing"


def test_replies_of_workers_add_up():
    both = Saved({1: (1, {5})}).aggregate(Saved({1: (1, {6}), 2: (1, set())}))
    assert both.jobs == {1: (2, {5, 6}), 2: (1, set())}


def test_after_a_reset_nothing_old_is_found_and_nothing_old_is_saved():
    node = warm()
    engine, running, loading = Engine(node), Request("running", list(range(12)), BLOCK), request()
    engine.admit(running, [20, 21, 22])
    engine.step({running: 4}, run=False)
    engine.admit(loading, [9, 8, 7, 6, 5])
    engine.step(run=False)
    assert engine.scheduler.reset()
    said = engine.step({running: 8})
    assert said.invalid_block_ids == {9, 8, 7, 6} and said.finished_recving == {"r"}
    assert len(node.blocks) == 4 and not engine.workers[0].cache.node.blocks
    assert engine.scheduler.matched(request("next"), 0) == (0, False)
    assert not engine.scheduler.finished(running)


def test_a_shutdown_lets_saves_end():
    engine, first = Engine(), request()
    engine.admit(first, [0, 1, 2, 3, 4])
    engine.step({first: 18}, run=False)
    engine.workers[0].close()
    assert len(engine.node.blocks) == 4 and engine.workers[0].cache.closed


def test_stats_add_up():
    one, two = TerraceStats(data={"loads": 1, "loaded_bytes": 5}), TerraceStats(data={"loads": 2})
    assert one.aggregate(two).data == {"loads": 3, "loaded_bytes": 5} and not one.is_empty()
    one.reset()
    assert one.is_empty()
    counts = {}
    counter = lambda name, documentation, labelnames: SimpleNamespace(  # noqa: E731
        labels=lambda *labels: SimpleNamespace(inc=lambda by: counts.update({name: by}))
    )
    TerraceMetrics(None, fake_counters(counter), ["engine"], {0: ["0"]}).observe({"loads": 2})
    assert counts == {"vllm:terrace_loads": 2}
    assert set(TerraceStats().reduce()) == set(COUNTERS)


def fake_counters(counter):
    try:
        from prometheus_client import Counter, Gauge, Histogram
    except ImportError:
        return {"counter": counter}
    return {Counter: counter, Gauge: counter, Histogram: counter}


def test_what_keeps_an_engine_from_the_others_is_told_by_the_half_that_hears_of_it(caplog):
    engine, first = Engine(warm()), request()
    engine.workers[0].cache.differs = 'kv_dtype was "u8", is "bf16"'
    for _ in range(3):
        engine.step({first: 0})
    (line,) = [record.getMessage() for record in caplog.records if "no prefix is shared" in record.getMessage()]
    assert line.endswith('kv_dtype was "u8", is "bf16"')
