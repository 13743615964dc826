"""Stage 1: fine-tune on the original and the paraphrased instructions; sft/model is a plain Hugging Face folder."""

from __future__ import annotations

from coalign.process import rank, world_size
from coalign.recipe import run_step
from coalign.records import Example, Task, Wording, read_rows
from coalign.report.model_cards import write_card
from coalign.runs.digests import digest_model_files, digest_replay
from coalign.runs.open_step import open_step
from coalign.runs.run_folder import base_model_folder
from coalign.steps import ENCODE


def main(argv: list[str]) -> None:
    """Encode the rows, train on them and export the model, on every rank."""
    needs = ("prepare", "paraphrase")
    step = open_step("sft", argv, needs, lambda config: digest_replay(config.sft) | digest_model_files(config.model))
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
    from coalign.training.objectives import sft_objective
    from coalign.training.token_files import TokenWriter, open_rows, prepare_rows, read_meta
    from coalign.training.training_rows import Encoder, training_wordings, write_sft

    config, table, output = step.config, step.config.sft, step.output
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    source = base_model_folder(config.model, step.needs["prepare"])
    codec = load_codec(source, config.model, step.output.date)
    wordings, rows = step.read(Wording), output.path / "shards" / "rows"
    chosen = training_wordings(wordings, table.wordings)

    def encode(writer: TokenWriter) -> None:
        encoder = Encoder(codec, config.model.too_long)
        write_sft(writer, step.read(Example), chosen, encoder, table, config.run.seed)

    device = None if ENCODE in argv else init_ranks()
    run_on_rank_zero(lambda: prepare_rows(rows, output.digest(codec.digest()), encode))
    if device is None:
        return
    stream, found = open_rows(rows), read_meta(rows)["counts"]
    plan = TrainingPlan(stream, sft_objective(), table.batch_rows, table.learning_rate, codec.pad_id, config.run.seed)
    step.announce(
        f"{found['inputs']} inputs, {sum(map(len, chosen.values()))} wordings, {plan.num_steps} updates of"
        f" {plan.batch_items} rows, {plan.num_tokens} tokens"
    )
    engine = DeepSpeedEngine(
        source, config.model, config.train, device, output.path / "deepspeed.json", config.run.seed
    )
    check_model(engine.model, codec.pad_id, source, samples=config.generation.engine != "vllm")
    settings = settle_layout(engine, stream, codec.pad_id, config.train, groups=False)
    try_export(engine, output.path / "shards" / "untrained", codec, stream)
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
