"""Stage 2: consistency alignment training on the ranked groups; align/model is a plain Hugging Face folder."""

from __future__ import annotations

from coalign.commandline import parse_command_line
from coalign.config_values import changed_values, table_values
from coalign.process import rank, world_size
from coalign.recipe import announce, exit_with_launcher, run_step, set_up_logging
from coalign.records import Example, Group, Wording, read_records, read_rows
from coalign.report.model_cards import write_card
from coalign.runs.run_folder import RunFolder
from coalign.steps import ENCODE, STEP_TABLES


def main(argv: list[str]) -> None:
    """Run the step on every rank."""
    config = parse_command_line("align", argv)
    set_up_logging(config.log.level)
    exit_with_launcher()
    run, table = RunFolder(config.run, argv), config.align
    needs = {name: run.step(name) for name in ("prepare", "paraphrase", "rank")} | {"policy": run.policy()}
    step = run.begin("align", table_values(config, STEP_TABLES["align"], with_neutral=False), needs)
    if step is None:
        return

    import torch

    from coalign.models.codec import Codec
    from coalign.models.model_folder import load_tokenizer
    from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks, run_on_rank_zero
    from coalign.training.dev_measure import make_dev_measure
    from coalign.training.export import export
    from coalign.training.layout_checks import check_shared_prefix
    from coalign.training.loop import TrainingPlan, train
    from coalign.training.losses import RankingForm
    from coalign.training.objectives import align_objective
    from coalign.training.reference import reference_logps
    from coalign.training.token_files import TokenWriter, open_rows, prepare_rows, read_meta
    from coalign.training.training_rows import Encoder, group_stream, write_groups

    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    source = str(needs["policy"] / "model")
    codec = Codec(load_tokenizer(source, config.model), config.model)
    examples, rows = needs["prepare"] / "examples.jsonl", step.path / "shards" / "rows"
    wordings = read_records(Wording, needs["paraphrase"] / "wordings.jsonl")

    def encode(writer: TokenWriter) -> None:
        groups = read_records(Group, needs["rank"] / "groups.jsonl")
        by_id = {e.id: e for e in read_records(Example, examples)}
        by_name = {(w.task, w.id): w for w in wordings}
        write_groups(writer, groups, by_id, by_name, Encoder(codec, config.model.too_long))

    device = None if ENCODE in argv else init_ranks()
    run_on_rank_zero(lambda: prepare_rows(rows, step.digest(codec.digest()), encode))
    if device is None:
        return
    items, found = open_rows(rows), read_meta(rows)["counts"]
    engine = DeepSpeedEngine(source, config.model, config.train, device, step.path / "deepspeed.json")
    if config.train.shared_prefix:
        check_shared_prefix(engine, items, codec.pad_id)
    if table.loss == "dpo":
        items = reference_logps(engine, items, codec.pad_id, config.train, step.path / "reference.jsonl")
    stream = group_stream(items, table, config.run.seed)
    form = RankingForm(table.loss, table.rank_weight, table.margin, table.beta)
    objective = align_objective(form, config.train.shared_prefix)
    plan = TrainingPlan(stream, objective, table.batch_groups, table.learning_rate, codec.pad_id)
    words = f"{len(items)} groups, {plan.num_steps} updates of {plan.batch_items} groups, {plan.num_tokens} tokens"
    announce("align", changed_values(config, STEP_TABLES["align"]), words)
    measure = make_dev_measure(engine, codec, read_records(Example, examples, split="dev"), wordings, config.train)
    totals = train(engine, plan, config.train, config.log, step.path, measure)
    export(engine, step.path / "model", codec, stream)
    if rank() == 0:
        step.write_output("dropped.jsonl", (row for _, row in read_rows(rows / "dropped.jsonl")))
        counts = totals | found
        write_card(step, run, counts, codec.end_of_turn)
        step.commit(counts | {"cores": world_size() * torch.get_num_threads(), "ranks": world_size()})


if __name__ == "__main__":
    run_step(main)
