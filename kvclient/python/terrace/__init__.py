"""Terrace for Python: KV-cache blocks for inference engines, kept on a node's RAM and NVMe.

    Client     blocking, for people: put, get, lookup, invalidate, stats
    Cache      for engines: lookups that never wait, loads and saves in threads of their own
    identity   from an engine's facts to the spec of a namespace
    vllm, vllm_tier, sglang   the connectors; imported only by the engines

Importing this package needs neither torch nor an engine.
"""

from terrace._terrace import Cache, Client, Finished, Transfer, __version__

__all__ = ["Cache", "Client", "Finished", "Transfer", "__version__"]
