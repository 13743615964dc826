"""The first engine: workers that sample answers and score continuations, with transformers or vLLM.

A request is a dict with a prompt's token ids and its seeds or continuations; a shard is a part of a
step's requests, as in clusters/. A row is one answer in the making; a slot is its place in the KV cache.

Begin with workers (which engine is used), then transformers_worker and vllm_worker.
Sampling: decoding (continuous batching), sampling (logits to a token), kv_cache (rows come and go), forward (one pass),
cuda_graphs (steps recorded on a GPU), cascade_attention (samples share their prompt).
Scoring: scoring (log-probs of continuations), prefix_groups (which sequences share a beginning).

It reads token ids and a model folder. It knows no tasks, wordings, judges, run folders or Ray.
"""
