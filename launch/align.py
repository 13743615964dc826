"""Stage 2: consistency alignment training on the ranked groups; align/model is a plain Hugging Face folder."""

from __future__ import annotations

from coalign.process import rank, world_size
from coalign.recipe import run_step
from coalign.records import Example, Group, Task, Wording, read_rows
from coalign.report.model_cards import write_card
from coalign.runs.open_step import open_step
from coalign.steps import ENCODE


def main(argv: list[str]) -> None:
    """Encode the groups, train on them and export the model, on every rank."""
    step = open_step("align", argv, ("prepare", "paraphrase", "rank", "policy"))
    if step is None:
        return

    import torch

    from coalign.models.model_checks import check_model
    from coalign.models.model_folder import load_codec
    from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks, run_on_rank_zero
    from coalign.training.dev_measure import make_dev_measure
    from coalign.training.export import export, try_export
    from coalign.training.layout_checks import settle_layout
    from coalign.training.loop import TrainingPlan, train
    from coalign.training.losses import RankingForm
    from coalign.training.objectives import align_objective
    from coalign.training.reference import reference_logps
    from coalign.training.token_files import TokenWriter, open_rows, prepare_rows, read_meta
    from coalign.training.training_rows import Encoder, group_stream, write_groups

    config, table, output = step.config, step.config.align, step.output
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    source = step.policy_model()
    codec = load_codec(source, config.model, step.output.date)
    wordings, rows = step.read(Wording), output.path / "shards" / "rows"

    def encode(writer: TokenWriter) -> None:
        by_id = {e.id: e for e in step.read(Example)}
        by_name = {(w.task, w.id): w for w in wordings}
        write_groups(writer, step.read(Group), by_id, by_name, Encoder(codec, config.model.too_long))

    device = None if ENCODE in argv else init_ranks()
    run_on_rank_zero(lambda: prepare_rows(rows, output.digest(codec.digest()), encode))
    if device is None:
        return
    items, found = open_rows(rows), read_meta(rows)["counts"]
    engine = DeepSpeedEngine(
        source, config.model, config.train, device, output.path / "deepspeed.json", config.run.seed
    )
    check_model(engine.model, codec.pad_id, source, samples=config.generation.engine != "vllm")
    settings = settle_layout(engine, items, codec.pad_id, config.train, groups=True)
    try_export(engine, output.path / "shards" / "untrained", codec, items)
    if table.loss == "dpo":
        items = reference_logps(engine, items, codec.pad_id, settings, output.path / "reference.jsonl")
    stream = group_stream(items, table, config.run.seed)
    form = RankingForm(table.loss, table.rank_weight, table.margin, table.beta)
    objective = align_objective(form, settings.shared_prefix)
    plan = TrainingPlan(stream, objective, table.batch_groups, table.learning_rate, codec.pad_id, config.run.seed)
    step.announce(
        f"{len(items)} groups, {plan.num_steps} updates of {plan.batch_items} groups, {plan.num_tokens} tokens"
    )
    measure = make_dev_measure(engine, codec, step.read(Example, split="dev"), wordings, settings, step.read(Task))
    totals = train(engine, plan, settings, config.log, output.path, measure)
    export(engine, output.path / "model", codec, stream)
    if rank() == 0:
        output.write_output("dropped.jsonl", (row for _, row in read_rows(rows / "dropped.jsonl")))
        counts = totals | found
        write_card(output, step.run, counts, codec.end_of_turn, codec.turn.describe())
        output.commit(counts | {"cores": world_size() * torch.get_num_threads(), "ranks": world_size()})


if __name__ == "__main__":
    run_step(main)
