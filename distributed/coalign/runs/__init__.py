"""What lies in runs/NAME/STEP: where it is, what it was made from, whether it is complete, and what it cost.

step_folder    one step's folder: manifest, lineage, staleness, resuming, one writer at a time
run_folder     where each step of a run lies, with borrowed steps and later rounds
open_step      how a recipe begins: from the words of its command to an open step folder
manifest       what a manifest must hold; outputs: what a step wrote, compared with its manifest
digests        SHA-256 of what a step reads and writes
atomic_files   files and folders that appear complete or not at all
encode_ahead   the token ids of a training step, written by the step before it
costs          time, cores and tokens of the steps, for the report

Steps are *needed* (what a step reads), *borrowed* (run.inputs) or *stale* (made from something else than now). A shard
is a part of a step's requests; its results are a file in shards/. This package knows no engine and no other package.
Begin with open_step, then step_folder.
"""
