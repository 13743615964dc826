"""What a run needs, by formula and before anything runs: memory, work, disk, hours; and the change that makes it fit.

`machine` reads the options of launch/plan.py: GPUs, ranks, the model's shape, assumptions. `data_counts` counts what
prepare made, or assumes it. `training_memory` has the formulas of a rank's memory (a worker's are in
models/worker_memory), `workload` those of tokens, FLOPs and bytes on disk. `plan` brings them together and looks for
the smallest change that makes a run fit. `plan_text` writes it down.

Words: a setup is one training step on a number of ranks; work is what one step computes and writes. GB are 10^9 bytes,
lengths are tokens, FLOPs count a multiplication and an addition as two. This package takes the whole config, since a
plan is about all steps. It starts nothing and looks at no device. Begin with `plan`.
"""
