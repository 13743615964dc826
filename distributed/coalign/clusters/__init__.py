"""Where steps run: workers and training ranks on a Ray cluster, and the jobs of a pipeline on Slurm.

Ray. `worker_pool` runs a step's rows on actors; `shards` keeps the results on disk. `training_ranks` starts DeepSpeed
ranks, on each node by `rank_host`. `ray_connection` connects to a cluster, and `private_ray`, the one module that
imports Ray, starts one. `placement` says whether a demand fits. `postmortem` and `exit_watcher` find out why a process
ended.

Slurm. `slurm_jobs` submits the steps with the flags of `slurm_flags`; `slurm_node` checks a node; `slurm_ray_node`
starts Ray on it.

Words: a demand is what Ray's placement groups call bundles; a worker is an actor with a model; a shard is a part of a
step's requests. This package sees a worker as a function of rows and a rank as a command. It may not know models,
prompts or losses. Begin with `worker_pool`, for training with `training_ranks`, for Slurm with `slurm_jobs`.
"""
