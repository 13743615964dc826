"""loop.train through the plain torch engine: schedule, checkpoints, resuming, NaN, signals, warnings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coalign.config import LogTable, TrainTable
from coalign.errors import UserError
from coalign.models.logprobs import token_logps
from coalign.training.loop import TrainingPlan, learning_rate_at, train
from coalign.training.losses import RankingForm
from coalign.training.micro_batches import Item, collate
from coalign.training.objectives import Objective, align_objective, sft_objective
from numerics.engine import TorchEngine
from numerics.tiny import network, random_ids, random_items

QUIET = LogTable(tensorboard=False)
Measure = Callable[[], dict[str, float]]


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Give back the signal handlers that a run which stopped has left."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def rows(count: int = 36) -> list[Item]:
    source = random.Random(0)
    return [Item(f"row{n}", random_ids(source, 2 + n % 5), (random_ids(source, 1 + n % 4),)) for n in range(count)]


def settings(**changed: Any) -> TrainTable:
    return TrainTable(**{"micro_batch_tokens": 30, "checkpoint_every": 3, "warmup_share": 0.2, **changed})


def new_engine(table: TrainTable) -> TorchEngine:
    return TorchEngine(network("llama", torch.float32), table)


def run(
    folder: Path, table: TrainTable, measure: Measure | None = None, objective: Objective | None = None,
    items: list[Item] | None = None, engine: TorchEngine | None = None,
) -> TorchEngine:  # fmt: skip
    """Train twelve updates of three rows, or resume."""
    engine = engine or new_engine(table)
    folder.mkdir(exist_ok=True)
    plan = TrainingPlan(items or rows(), objective or sft_objective(), 3, 5e-3, 0)
    train(engine, plan, table, QUIET, folder, measure)
    return engine


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in found]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class DyingEngine(TorchEngine):
    """Is killed in the middle of an update, or of writing a checkpoint."""

    dies_at_step = 8
    dies_in_save = ""
    steps = 0

    def step(self, learning_rate: float) -> float:
        self.steps += 1
        if self.steps == self.dies_at_step:
            raise Killed
        return super().step(learning_rate)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        if folder.name == self.dies_in_save:
            folder.mkdir(parents=True)
            (folder / "weights.pt").write_bytes(b"half")
            raise Killed
        super().save(folder, state)


def dying(table: TrainTable, **when: Any) -> TorchEngine:
    engine = DyingEngine(network("llama", torch.float32), table)
    vars(engine).update(when)
    return engine


def measure_of(engine: TorchEngine) -> Measure:
    """Return a dev measurement of the engine's weights."""
    batch = collate(rows(4), 0, False)

    def measure() -> dict[str, float]:
        with torch.no_grad():
            return {"p_gold": float(token_logps(engine.model, batch).mean())}

    return measure


def test_learning_rates_by_hand() -> None:
    """Warm-up rises to the highest rate; constant stays, linear and cosine fall towards the final share."""

    def rates(**changed: Any) -> list[float]:
        table = TrainTable(**{"warmup_share": 0.2, "final_lr_share": 0.1, **changed})
        return [learning_rate_at(step, 10, 1.0, table) for step in range(10)]

    assert rates(schedule="constant") == pytest.approx([0.5] + [1.0] * 9)
    assert rates(schedule="linear") == pytest.approx([0.5, 1.0] + [0.1 + 0.9 * (8 - k) / 8 for k in range(8)])
    cosine = rates(schedule="cosine")
    assert cosine[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert cosine[6] == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert cosine[4] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert all(a > b > 0.1 for a, b in itertools.pairwise(cosine[2:]))
    assert rates(schedule="linear", warmup_share=0.0)[0] == 1.0
    assert rates(schedule="cosine", warmup_share=1.0) == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert learning_rate_at(9, 10, 3e-5, TrainTable(schedule="constant", warmup_share=0.0)) == 3e-5


def test_training_learns_and_logs_every_update(tmp_path: Path) -> None:
    """The loss falls, and each line has what the schedule and the batches say."""
    table = settings()
    run(tmp_path, table)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 13))
    assert [line["learning_rate"] for line in found] == [learning_rate_at(k, 12, 5e-3, table) for k in range(12)]
    items = rows()
    for k, line in enumerate(found):
        part = items[3 * k : 3 * k + 3]
        assert line["answer_tokens"] == sum(len(i.responses[0]) for i in part)
        assert line["tokens"] == sum(len(i.prompt) + len(i.responses[0]) - 1 for i in part)
    batch = collate(items[:3], 0, False)
    with torch.no_grad():
        start = -float(token_logps(new_engine(table).model, batch).mean())
    assert found[0]["loss"] == pytest.approx(start, abs=1e-5)
    again = run(tmp_path / "again", table, items=rows(3) * 12)
    assert again.dtype is torch.float32 and lines(tmp_path / "again")[-1]["loss"] < 0.7 * start


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """keep_last of them stay, the last update's among them."""
    run(tmp_path / "two", settings(keep_last=2))
    assert checkpoints(tmp_path / "two") == ["step_000009", "step_000012"]
    run(tmp_path / "one", settings(keep_last=1, checkpoint_every=5))
    assert checkpoints(tmp_path / "one") == ["step_000012"]
    run(tmp_path / "many", settings(keep_last=9, checkpoint_every=5))
    assert checkpoints(tmp_path / "many") == ["step_000005", "step_000010", "step_000012"]


@pytest.mark.parametrize("when", [{"dies_at_step": 8}, {"dies_at_step": 7}, {"dies_in_save": "step_000009"}])
def test_a_killed_run_ends_like_an_undisturbed_one(when: dict[str, Any], tmp_path: Path) -> None:
    """Killed in an update or while a checkpoint is written: the same lines and the same weights, to the bit."""
    table = settings(eval_every=2)
    undisturbed = new_engine(table)
    run(tmp_path / "a", table, measure_of(undisturbed), engine=undisturbed)
    killed = dying(table, **{"dies_at_step": 0, **when})
    with pytest.raises(Killed):
        run(tmp_path / "b", table, measure_of(killed), engine=killed)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    resumed = new_engine(table)
    run(tmp_path / "b", table, measure_of(resumed), engine=resumed)
    assert lines(tmp_path / "b") == lines(tmp_path / "a")
    assert {line["kind"] for line in lines(tmp_path / "b")} == {"train", "dev"}
    for key, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key])
    assert checkpoints(tmp_path / "b") == ["step_000009", "step_000012"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    """Lines of the lost updates do not stay in metrics.jsonl."""
    table = settings()
    with pytest.raises(Killed):
        run(tmp_path, table, engine=dying(table, dies_at_step=2))
    run(tmp_path, table)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))


def truncate(checkpoint: Path) -> None:
    (checkpoint / "weights.pt").write_bytes((checkpoint / "weights.pt").read_bytes()[:-100])


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "weights.pt").write_bytes(bytes(content))


def lose(checkpoint: Path) -> None:
    (checkpoint / "weights.pt").unlink()


def cut_meta(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text('{"state": {"st')


@pytest.mark.parametrize("damage", [truncate, flip, lose, cut_meta])
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on from the one before, says so, and ends as if nothing had happened."""
    table = settings()
    run(tmp_path / "a", table)
    with pytest.raises(Killed):
        run(tmp_path / "b", table, engine=dying(table, dies_at_step=8))
    assert checkpoints(tmp_path / "b") == ["step_000003", "step_000006"]
    damage(tmp_path / "b" / "checkpoints" / "step_000006")
    with caplog.at_level(logging.INFO, "coalign"):
        run(tmp_path / "b", table)
    assert "step_000006 is passed over" in caplog.text and "resuming after update 3" in caplog.text
    assert lines(tmp_path / "b") == lines(tmp_path / "a")


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """With keep_last = 1 the checkpoint just written stays, though the damaged one bears a later number."""
    table = settings(keep_last=1, checkpoint_every=10)
    with pytest.raises(Killed):
        run(tmp_path, table, engine=dying(table, dies_at_step=11))
    truncate(tmp_path / "checkpoints" / "step_000010")
    with pytest.raises(Killed):
        run(tmp_path, settings(keep_last=1, checkpoint_every=4), engine=dying(table, dies_at_step=6))
    assert checkpoints(tmp_path) == ["step_000004"]


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All damaged: each is named, and the run starts at update one."""
    table = settings()
    with pytest.raises(Killed):
        run(tmp_path, table, engine=dying(table))
    for name in checkpoints(tmp_path):
        truncate(tmp_path / "checkpoints" / name)
    with caplog.at_level(logging.INFO, "coalign"):
        run(tmp_path, table)
    assert caplog.text.count("is passed over") == 2 and "resuming" not in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))


def test_a_finished_run_trains_nothing_again(tmp_path: Path) -> None:
    """Its last checkpoint is the end: an export that failed does not cost the training."""
    table = settings()
    done = run(tmp_path, table)
    resumed = run(tmp_path, table, engine=dying(table, dies_at_step=1))
    assert all(torch.equal(t, resumed.model.state_dict()[k]) for k, t in done.model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The rows of the micro-batch are named, the log ends before it and the checkpoint stays good."""
    table = settings()
    engine = new_engine(table)
    items = [i for i in rows(200) if 63 not in (*i.prompt, *i.responses[0])][:36]
    items[23] = dataclasses.replace(items[23], prompt=(63, 63))  # in update 8
    with torch.no_grad():
        engine.model.module.get_input_embeddings().weight[63] = float("nan")
    others = "".join(f"({item.name}, )?" for item in items[21:23])  # in the same micro-batch
    shown = rf"the loss is no longer finite in an update with the rows {others}{items[23].name}; the last"
    with pytest.raises(UserError, match=shown):
        run(tmp_path, table, items=items, engine=engine)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8))
    assert checkpoints(tmp_path) == ["step_000003", "step_000006"]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """A finite loss with a NaN gradient stops before a checkpoint can hold the spoilt weights."""
    plain = sft_objective()

    def loss(logp_N: torch.Tensor, batch: Any, items: Any, denominator: int) -> Any:
        value, parts = plain.loss(logp_N, batch, items, denominator)
        spoilt = any(item.name == "row8" for item in items)  # in update 3
        return value + (logp_N.sum() * 0).abs().sqrt() if spoilt else value, parts

    with pytest.raises(UserError, match=r"the gradient is no longer finite .* row6, row7, row8"):
        run(tmp_path, settings(), objective=dataclasses.replace(plain, loss=loss))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """A scheduler's warning is answered with a checkpoint after the update at hand; the next start goes on there."""
    table = settings(eval_every=1)
    plain = new_engine(table)
    run(tmp_path / "a", table, measure_of(plain), engine=plain)
    engine = new_engine(table)
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:  # the first is before update 1
            os.kill(os.getpid(), number)
        return measure_of(engine)()

    with pytest.raises(SystemExit, match="stopped by a signal after update 4"):
        run(tmp_path / "b", table, measure, engine=engine)
    assert checkpoints(tmp_path / "b") == ["step_000003", "step_000004"]
    resumed = new_engine(table)
    run(tmp_path / "b", table, measure_of(resumed), engine=resumed)
    assert lines(tmp_path / "b") == lines(tmp_path / "a")


def scripted(values: list[dict[str, float]]) -> Measure:
    answers = iter(values)
    return lambda: next(answers)


GOOD = {"accuracy": 0.8, "end_of_turn": 1.0, "distinct_answers": 50.0, "p_gold": -1.0, "cr": 0.5}


@pytest.mark.parametrize(
    ("key", "low", "fine"),
    [
        ("accuracy", 0.65, 0.75),
        ("end_of_turn", 0.85, 0.95),
        ("distinct_answers", 30.0, 40.0),
        ("p_gold", -2.5, -1.5),
    ],
)
def test_decay_on_dev_is_warned_of(
    key: str, low: float, fine: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What falls away since the start is named with both values; small changes and a lower cr are not."""
    with caplog.at_level(logging.WARNING, "coalign"):
        run(tmp_path / "fine", settings(eval_every=12), scripted([GOOD, {**GOOD, key: fine, "cr": 0.1}]))
    assert "warning" not in caplog.text
    with caplog.at_level(logging.WARNING, "coalign"):
        run(tmp_path / "low", settings(eval_every=12), scripted([GOOD, {**GOOD, key: low}]))
    assert f"dev {key} fell from {GOOD[key]:.3f} to {low:.3f}" in caplog.text


def test_decay_is_measured_from_the_start_after_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first measurement travels in the checkpoint."""
    table = settings(eval_every=12)
    with pytest.raises(Killed):
        run(tmp_path, table, scripted([GOOD]), engine=dying(table))
    with caplog.at_level(logging.WARNING, "coalign"):
        run(tmp_path, table, scripted([{**GOOD, "accuracy": 0.1}]))
    assert "dev accuracy fell from 0.800 to 0.100" in caplog.text


def test_falling_best_responses_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the ranking term pushes the best responses down with the rest, it is said, once."""
    plain = sft_objective()
    falling = iter([-1.0] + [-4.0] * 11)
    objective = dataclasses.replace(plain, describe=lambda sums: {"p_best": next(falling)})
    with caplog.at_level(logging.WARNING, "coalign"):
        run(tmp_path, settings(), objective=objective)
    assert caplog.text.count("log-prob of best responses fell from -1.000") == 1


def test_align_logs_its_parts(tmp_path: Path) -> None:
    """loss = loss_best + lambda loss_ranking, p_best = - loss_best, and the share of active pairs lies in [0, 1]."""
    items = random_items(36, seed=8)
    objective = align_objective(RankingForm("hinge", rank_weight=0.5, margin=0.2), shared_prefix=True)
    run(tmp_path, settings(), objective=objective, items=items)
    for k, line in enumerate(lines(tmp_path)):
        part = items[3 * k : 3 * k + 3]
        assert line["loss"] == pytest.approx(line["loss_best"] + 0.5 * line["loss_ranking"], abs=1e-5)
        assert line["p_best"] == -line["loss_best"] and 0 <= line["active_pairs"] <= 1
        assert line["pairs"] == sum(a > b for item in part for a in item.rewards for b in item.rewards)
        assert line["best_length"] == pytest.approx(sum(len(i.responses[i.best]) for i in part) / 3)


def test_worst_responses_are_those_of_the_lowest_reward(tmp_path: Path) -> None:
    """p_worst is the mean over a group's lowest reward, the best aside: all others where they are tied."""
    source = random.Random(3)
    groups = [tuple(random_ids(source, 3) for _ in range(3)) for _ in range(36)]
    objective = align_objective(RankingForm("hinge", rank_weight=1.0), shared_prefix=True)
    logged = {}
    for name, rewards in (("tied", (2, 0, 0)), ("apart", (2, 1, 0)), ("pair", (2, 0))):
        prompts = (random_ids(random.Random(4), 4) for _ in groups)
        items = [
            Item(f"row{n}", prompt, group[:1] + group[3 - len(rewards) + 1 :], rewards)
            for n, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]
        run(tmp_path / name, settings(), objective=objective, items=items)
        logged[name] = lines(tmp_path / name)[0]
    assert logged["tied"]["p_worst"] == pytest.approx(logged["tied"]["p_others"])
    assert logged["apart"]["p_worst"] != pytest.approx(logged["apart"]["p_others"], abs=1e-6)
    assert logged["apart"]["p_worst"] == pytest.approx(logged["pair"]["p_others"], abs=1e-5)


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    """An event file beside metrics.jsonl, when log.tensorboard asks for it."""
    table = settings()
    train(new_engine(table), TrainingPlan(rows(6), sft_objective(), 3, 1e-3, 0), table, LogTable(), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    shutil.rmtree(tmp_path / "tensorboard")
    train(new_engine(table), TrainingPlan(rows(6), sft_objective(), 3, 1e-3, 0), table, QUIET, tmp_path)
    assert not (tmp_path / "tensorboard").exists()
