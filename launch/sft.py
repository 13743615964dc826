"""Stage 1: fine-tune on the original and the paraphrased instructions; sft/model is a plain Hugging Face folder."""

from __future__ import annotations

from coalign.commandline import parse_command_line
from coalign.config_values import changed_values, table_values
from coalign.process import rank, world_size
from coalign.recipe import announce, exit_with_launcher, run_step, set_up_logging
from coalign.records import Example, Wording, read_records, read_rows
from coalign.report.model_cards import write_card
from coalign.runs.digests import digest_model_files, digest_replay
from coalign.runs.run_folder import RunFolder, base_model_folder
from coalign.steps import ENCODE, STEP_TABLES


def main(argv: list[str]) -> None:
    """Run the step on every rank."""
    config = parse_command_line("sft", argv)
    set_up_logging(config.log.level)
    exit_with_launcher()
    run = RunFolder(config.run, argv)
    needs = {"prepare": run.step("prepare"), "paraphrase": run.step("paraphrase")}
    settings = table_values(config, STEP_TABLES["sft"], with_neutral=False)
    step = run.begin("sft", settings, needs, digest_replay(config.sft) | digest_model_files(config.model))
    if step is None:
        return

    import torch

    from coalign.models.codec import Codec
    from coalign.models.model_folder import load_tokenizer
    from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks, run_on_rank_zero
    from coalign.training.dev_measure import make_dev_measure
    from coalign.training.export import export
    from coalign.training.layout_checks import check_packing
    from coalign.training.loop import TrainingPlan, train
    from coalign.training.objectives import sft_objective
    from coalign.training.token_files import TokenWriter, open_rows, prepare_rows, read_meta
    from coalign.training.training_rows import Encoder, training_wordings, write_sft

    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    source = base_model_folder(config.model, needs["prepare"])
    codec = Codec(load_tokenizer(source, config.model), config.model)
    examples, rows = needs["prepare"] / "examples.jsonl", step.path / "shards" / "rows"
    wordings = read_records(Wording, needs["paraphrase"] / "wordings.jsonl")
    chosen = training_wordings(wordings, config.sft.wordings)

    def encode(writer: TokenWriter) -> None:
        encoder = Encoder(codec, config.model.too_long)
        write_sft(writer, read_records(Example, examples), chosen, encoder, config.sft, config.run.seed)

    device = None if ENCODE in argv else init_ranks()
    run_on_rank_zero(lambda: prepare_rows(rows, step.digest(codec.digest()), encode))
    if device is None:
        return
    stream, found = open_rows(rows), read_meta(rows)["counts"]
    plan = TrainingPlan(stream, sft_objective(), config.sft.batch_rows, config.sft.learning_rate, codec.pad_id)
    words = (
        f"{found['inputs']} inputs, {sum(map(len, chosen.values()))} wordings, {plan.num_steps} updates of"
        f" {plan.batch_items} rows, {plan.num_tokens} tokens"
    )
    announce("sft", changed_values(config, STEP_TABLES["sft"]), words)

    engine = DeepSpeedEngine(source, config.model, config.train, device, step.path / "deepspeed.json")
    if config.train.pack_tokens:
        check_packing(engine, stream, codec.pad_id)
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
