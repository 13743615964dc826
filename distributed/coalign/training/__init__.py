"""The second engine: both training stages, SFT on wordings and alignment on ranked groups, over DeepSpeed ranks.

An item is a prompt with its responses as token ids; several items may share a row, as in models/. An update is one
optimizer step over a fixed number of items, split into micro-batches. A group is rank's unit, and becomes one item.

Begin with loop (the training loop), then objectives and losses (what it minimises).
Data: training_rows (records to items), token_files (items on disk), forked_map (encoding on all cores).
Batches: micro_batches (items to batches), layout_checks (shared rows equal separate ones), reference (DPO's log-probs).
Ranks: engine (the protocol), deepspeed_engine (its implementation), rendezvous (the ranks meet).
Results: checkpoints, training_log, dev_measure (a small measurement on dev inputs), export (the verified model folder).

It knows no generation workers, judges or Ray; with evaluation/ it shares only how answers are compared.
"""
